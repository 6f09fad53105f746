"""Redeeming: everything owed is handed in, whatever the escrow does meanwhile, and never twice."""

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from tests.provider.journals import Clock, admitted, session_id
from tests.provider.redeeming import A, B, C, Shop, amounts, open_shop, until
from tests.provider.scripted_escrow import Held, ScriptedEscrow
from tests.support.payments import NOW, TOKEN
from x402mw.core.amounts import Atomic, display
from x402mw.core.errors import EscrowRefused, EscrowUnavailable
from x402mw.core.gate import Refused
from x402mw.core.sessions import SessionState
from x402mw.provider.journal.redemption import REST_SECONDS
from x402mw_client import operations

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The escrow's client gives up at once."""
    monkeypatch.setattr(operations, "PAUSES_SECONDS", (0.0,))


@pytest.fixture
async def shop(place: str) -> AsyncIterator[Shop]:
    """An open shop, with an escrow that does as it is told."""
    opened = await open_shop(place, ScriptedEscrow(), Clock())
    yield opened
    await opened.redeemer.stop()
    await opened.stop()


# When.


async def test_redeems_by_age(shop: Shop) -> None:
    """What is owed is redeemed once it is `by_age` old, with the newest voucher, once."""
    await shop.sell(A, 3)
    await shop.redeemer._round()
    assert amounts(shop.escrow) == []
    shop.clock.now += 5
    await shop.redeemer._round()
    await shop.redeemer._round()
    assert amounts(shop.escrow) == [["0.003"]]
    assert shop.escrow.sessions[A].redeemed == 3000
    assert shop.journal.unredeemed == 0


async def test_age_counts_from_the_first_unredeemed_charge(shop: Shop) -> None:
    """After a redemption the age of what is charged next begins anew."""
    await shop.sell(A)
    shop.clock.now += 5
    await shop.redeemer._round()
    shop.clock.now += 100
    await shop.sell(A)
    await shop.redeemer._round()
    assert len(amounts(shop.escrow)) == 1
    shop.clock.now += 5
    await shop.redeemer._round()
    assert amounts(shop.escrow) == [["0.001"], ["0.002"]]


async def test_changes_that_pay_nothing_do_not_put_it_off(shop: Shop) -> None:
    """However often a buyer tops up, what it owes is redeemed at its age."""
    await shop.sell(A)
    for deposit in range(6):
        shop.escrow.change(A, deposit=2_000_000 + deposit)
        await shop.redeemer._round()
        shop.clock.now += 1
    assert amounts(shop.escrow) == [["0.001"]]


async def test_a_wrong_clock_redeems_everything(shop: Shop) -> None:
    """While our clock is off no age or deadline can be told, so nothing owed waits for one."""
    await shop.sell(A)
    shop.escrow.date = NOW
    shop.clock.now -= 3600
    await shop.redeemer._round()
    assert amounts(shop.escrow) == [["0.001"]]


async def test_redeems_by_amount(place: str) -> None:
    """A session that owes `by_amount` is redeemed without waiting; others wait."""
    shop = await open_shop(place, ScriptedEscrow(), Clock(), by_amount=Atomic(3000))
    await shop.sell(A, 3)
    await shop.sell(B, 2)
    await shop.redeemer._round()
    assert amounts(shop.escrow) == [["0.003"]]
    await shop.stop()


async def test_redeems_before_vouchers_run_out(place: str) -> None:
    """However patient, a session is redeemed well before the last minute of its vouchers."""
    shop = await open_shop(place, ScriptedEscrow(), Clock(), by_age=10**6)
    await shop.sell(A)
    shop.clock.now = TOKEN.claim_until - 121
    await shop.redeemer._round()
    assert amounts(shop.escrow) == []
    shop.clock.now = TOKEN.claim_until - 120
    await shop.redeemer._round()
    assert amounts(shop.escrow) == [["0.001"]]
    await shop.stop()


async def test_redeems_when_nudged(shop: Shop) -> None:
    """A nudge has everything owed redeemed by the task, at once."""
    await shop.redeemer.start()
    await shop.sell(A)
    await shop.sell(B)
    shop.redeemer.nudge()
    await until(lambda: shop.journal.unredeemed == 0)
    assert sorted(shop.escrow.sessions) == [A, B]


async def test_a_batch_has_at_most_a_thousand_items(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large debts go in several batches (shown with batches of 4)."""
    monkeypatch.setattr("x402mw.provider.redeemer.ITEMS_MAX", 4)
    for number in range(10):
        await shop.sell(session_id(number))
    await shop.redeemer.redeem_all()
    assert [len(batch) for batch in amounts(shop.escrow)] == [4, 4, 2]


# Faults.


async def test_escrow_down_and_back(shop: Shop) -> None:
    """With the escrow down the task goes on trying; when it is back everything is redeemed."""
    await shop.redeemer.start()
    shop.escrow.down = True
    await shop.sell(A, 2)
    shop.clock.now += 5
    await until(lambda: shop.redeemer._failures >= 2)
    assert shop.link.away
    assert shop.journal.unredeemed == 2000
    assert not await shop.redeemer.redeem_session(A, final=False)
    shop.escrow.down = False
    await until(lambda: shop.journal.unredeemed == 0)
    assert not shop.link.away


@pytest.mark.parametrize(
    "garbage",
    [b"", b"<html>", b"[]", b"{}", b'{"serial": 0, "items": []}', b'{"serial": "x"}', b"\xff"],
)
async def test_garbage_is_unknown(shop: Shop, garbage: bytes) -> None:
    """An answer that makes no sense is neither success nor refusal: the same is sent again."""
    await shop.redeemer.contact()
    await shop.sell(A)
    shop.escrow.garbage = garbage
    with pytest.raises(EscrowUnavailable):
        await shop.redeemer.redeem_all()
    assert shop.journal.unredeemed == 1000
    shop.escrow.garbage = None
    await shop.redeemer.redeem_all()
    assert amounts(shop.escrow) == [["0.001"], ["0.001"]]
    assert (shop.escrow.sessions[A].redeemed, shop.journal.unredeemed) == (1000, 0)


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
async def test_a_refused_call_is_no_verdict(shop: Shop, status: int) -> None:
    """When the escrow refuses the call as a whole, nothing is written off."""
    await shop.redeemer.contact()
    await shop.sell(A)
    shop.escrow.status = status
    with pytest.raises((EscrowUnavailable, EscrowRefused)):
        await shop.redeemer.redeem_all()
    shop.escrow.status = 0
    await shop.redeemer.redeem_all()
    assert shop.journal.unredeemed == 0


@pytest.mark.parametrize("status", [401, 403, 503])
async def test_it_fails_until_a_whole_round_succeeds(shop: Shop, status: int) -> None:
    """An escrow that answers but takes no redemption is as good as away: `failing` says so."""
    assert not shop.redeemer.failing
    await shop.redeemer.start()
    shop.escrow.status = status
    await until(lambda: shop.redeemer.failing)
    shop.escrow.status = 0
    await until(lambda: not shop.redeemer.failing)


@pytest.mark.parametrize(
    "verdict",
    [
        {"ok": True},
        {"ok": True, **Held(redeemed=2000).as_json(B)},
        {"ok": True, "escrow_id": "esc_" + A.hex(), "redeemed": "0.002", "state": "locked"},
        {"ok": False},
        {"ok": False, "code": "odd", "detail": "?"},
    ],
)
async def test_an_unclear_verdict_rests(shop: Shop, verdict: Any) -> None:
    """A verdict for another session, or half a one, changes nothing; the item is sent later."""
    await shop.sell(A, 2)
    shop.escrow.verdicts[A] = verdict
    await shop.redeemer.redeem_all()
    assert shop.journal.unredeemed == 2000
    await shop.redeemer.redeem_all()
    assert len(amounts(shop.escrow)) == 1
    shop.escrow.verdicts.clear()
    shop.clock.now += REST_SECONDS
    await shop.redeemer.redeem_all()
    assert (shop.escrow.sessions[A].redeemed, shop.journal.unredeemed) == (2000, 0)


async def test_one_bad_item_blocks_no_other(shop: Shop) -> None:
    """An item refused for good is written off, the others of its batch are redeemed."""
    for session in (A, B, C):
        await shop.sell(session)
    shop.escrow.refusals[B] = "signature"
    await shop.redeemer.redeem_all()
    assert [shop.escrow.sessions[session].redeemed for session in (A, C)] == [1000, 1000]
    assert shop.journal.unredeemed == 0
    account = await shop.journal.account(B)
    assert account is not None
    assert account.state is SessionState.CLOSED


async def test_a_poisoned_batch_is_taken_apart(shop: Shop) -> None:
    """If one item makes the escrow refuse the whole batch, all others still get through."""
    for number in range(20):
        await shop.sell(session_id(number))
    shop.escrow.poison = {session_id(7), session_id(8)}
    await shop.redeemer.redeem_all()
    assert len(shop.escrow.sessions) == 18
    assert shop.journal.unredeemed == 2000
    shop.escrow.poison.clear()
    shop.clock.now += REST_SECONDS
    await shop.redeemer.redeem_all()
    assert shop.journal.unredeemed == 0


async def test_sent_is_written_before_it_is_sent(shop: Shop, place: str) -> None:
    """Killed between sending and hearing, the journal knows what it sent; sending again is safe."""
    await shop.redeemer.contact()
    await shop.sell(A, 2)
    shop.escrow.answer_lost = True
    with pytest.raises(EscrowUnavailable):
        await shop.redeemer.redeem_all()
    assert shop.escrow.sessions[A].redeemed == 2000
    await shop.stop()
    shop.escrow.answer_lost = False
    again = await open_shop(place, shop.escrow, shop.clock)
    assert again.journal.unredeemed == 2000
    await again.redeemer.redeem_all()
    assert again.journal.replaced == frozenset()
    assert (again.escrow.sessions[A].redeemed, again.journal.unredeemed) == (2000, 0)
    await again.stop()


async def test_a_lost_first_answer_is_no_restored_backup(place: str) -> None:
    """However often the first contact is repeated, our own serial is not taken for another's."""
    shop = await open_shop(place, ScriptedEscrow(), Clock())
    await shop.sell(A)
    shop.escrow.answer_lost = True
    for _ in range(3):
        await shop.sell(A)
        with pytest.raises(EscrowUnavailable):
            await shop.redeemer.contact()
    shop.escrow.answer_lost = False
    await shop.redeemer.contact()
    assert shop.journal.replaced == frozenset()
    await shop.stop()


# Closing.


async def test_final_redemption(shop: Shop) -> None:
    """A close redeems what was charged and ends the session; repeating it is done already."""
    await shop.sell(A, 2)
    assert not await shop.redeemer.redeem_session(A, final=True)
    await shop.journal.begin_close(shop.claim(A))
    assert await shop.redeemer.redeem_session(A, final=True)
    assert await shop.redeemer.redeem_session(A, final=True)
    assert shop.escrow.sessions[A].state == "settled"
    assert amounts(shop.escrow) == [["0.002"]]


async def test_final_redemption_waits_for_open_calls(shop: Shop) -> None:
    """A session is not closed at the escrow while one of its calls is open."""
    call = await admitted(shop.journal, shop.claim(A))
    await shop.journal.begin_close(shop.claim(A))
    assert not await shop.redeemer.redeem_session(A, final=True)
    await shop.journal.settle(call, used=0, outcome=None)
    assert await shop.redeemer.redeem_session(A, final=True)
    assert shop.escrow.sessions[A].redeemed == 1000


async def test_close_without_a_voucher(shop: Shop) -> None:
    """A session closed before it was ever used is ended with nothing charged."""
    await shop.journal.begin_close(shop.claim(A))
    assert await shop.redeemer.redeem_session(A, final=True)
    (body,) = shop.escrow.asked("redeem")
    (item,) = body["items"]
    assert item == {"escrow_id": "esc_" + A.hex(), "amount": display(0), "final": True}


async def test_a_close_that_could_not_be_sent_is_finished_behind(shop: Shop) -> None:
    """If the escrow is away when a buyer closes, the task closes the session once it is back."""
    await shop.redeemer.start()
    await shop.sell(A)
    shop.escrow.down = True
    await shop.journal.begin_close(shop.claim(A))
    assert not await shop.redeemer.redeem_session(A, final=True)
    shop.escrow.down = False
    await until(lambda: A in shop.escrow.sessions and shop.escrow.sessions[A].state == "settled")
    assert await shop.redeemer.redeem_session(A, final=True)


async def test_redeem_session(shop: Shop) -> None:
    """One session can be redeemed by itself; with nothing owed that is done at once."""
    await shop.sell(A)
    await shop.sell(B)
    assert await shop.redeemer.redeem_session(A, final=False)
    assert await shop.redeemer.redeem_session(A, final=False)
    assert amounts(shop.escrow) == [["0.001"]]
    shop.escrow.refusals[B] = "signature"
    assert not await shop.redeemer.redeem_session(B, final=False)


async def test_stopping_hands_in_what_is_owed(place: str) -> None:
    """A provider that stops redeems first; with the escrow away it stops all the same."""
    shop = await open_shop(place, ScriptedEscrow(), Clock())
    await shop.redeemer.start()
    await shop.sell(A)
    await shop.redeemer.stop()
    assert shop.escrow.sessions[A].redeemed == 1000
    await shop.sell(A)
    shop.escrow.down = True
    await shop.redeemer.stop()
    assert shop.journal.unredeemed == 1000
    await shop.stop()


# What the escrow knows.


async def test_releases_by_the_buyer_count(shop: Shop) -> None:
    """What the buyer paid out by hand is not redeemed again, and is no longer owed."""
    await shop.sell(A, 3)
    shop.escrow.change(A, released=2000)
    await shop.redeemer._round()
    assert shop.journal.unredeemed == 1000
    shop.escrow.change(A, released=3000)
    shop.clock.now += 5
    await shop.redeemer._round()
    assert shop.journal.unredeemed == 0
    assert amounts(shop.escrow) == []


async def test_a_session_that_ended_unpaid_is_written_off(shop: Shop) -> None:
    """What a session owed when the escrow ended it is shown as lost, and takes no new calls."""
    await shop.sell(A, 3)
    shop.escrow.change(A, state="refunded")
    await shop.redeemer._round()
    assert shop.journal.unredeemed == 0
    with pytest.raises(Refused) as refused:
        await shop.sell(A)
    assert refused.value.reason == "session_closing"


async def test_changes_are_read_once(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes are read page by page, and never from the start again."""
    monkeypatch.setattr("x402mw.provider.redeemer.ITEMS_MAX", 2)
    for number in range(5):
        shop.escrow.change(session_id(number), released=1)
    await shop.redeemer.contact()
    await shop.redeemer.contact()
    assert [body["since"] for body in shop.escrow.asked("changes")] == ["0", "2", "4", "5"]


async def test_changes_that_run_backwards_are_garbage(shop: Shop) -> None:
    """A cursor below ours is not believed."""
    shop.escrow.change(A, released=1)
    await shop.redeemer.contact()
    shop.escrow.garbage = b'{"next": 0, "serial": 0, "changes": []}'
    with pytest.raises(EscrowUnavailable):
        await shop.redeemer.contact()
    assert shop.journal.changes_cursor == 1


# The task.


async def test_the_task_outlives_its_own_mistakes(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that nobody foresaw is logged, and the task goes on."""
    due = shop.journal.due
    failures = [ZeroDivisionError(), KeyError()]

    async def odd(*given: Any) -> Any:
        if failures:
            raise failures.pop()
        return await due(*given)

    monkeypatch.setattr(shop.journal, "due", odd)
    await shop.redeemer.start()
    await shop.sell(A)
    shop.clock.now += 5
    await until(lambda: shop.journal.unredeemed == 0)


async def test_a_long_outage_does_not_end_the_task(shop: Shop) -> None:
    """After thousands of failures the task still comes back, at the longest pause."""
    shop.redeemer._failures = 10_000
    shop.redeemer._round_seconds = 1e-9
    with anyio.fail_after(1):
        await shop.redeemer._pause()


async def test_starts_with_the_escrow_away(place: str) -> None:
    """After its first start a provider starts with the escrow away, and redeems once it is back."""
    shop = await open_shop(place, ScriptedEscrow(), Clock())
    await shop.sell(A)
    await shop.stop()
    shop.escrow.down = True
    shop.clock.now = NOW + 5
    shop = await open_shop(place, shop.escrow, shop.clock)
    await shop.redeemer.start()
    assert shop.link.away
    shop.escrow.down = False
    await until(lambda: shop.journal.unredeemed == 0)
    await shop.redeemer.stop()
    await shop.stop()

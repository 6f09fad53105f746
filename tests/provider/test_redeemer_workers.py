"""Redeeming for several workers: one does it for all, each knows the escrow, none loses by it."""

from collections.abc import AsyncIterator

import pytest

from tests.provider.journals import Clock, admit
from tests.provider.redeeming import A, B, Shop, amounts, open_shop, until
from tests.provider.scripted_escrow import ScriptedEscrow
from x402mw.core.amounts import Atomic
from x402mw.core.gate import Refused
from x402mw.provider.journal import Report, writer
from x402mw_client import operations

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The escrow's client gives up at once, and workers look for each other all the time."""
    monkeypatch.setattr(operations, "PAUSES_SECONDS", (0.0,))
    monkeypatch.setattr(writer, "ROUND_SECONDS", 0.02)


@pytest.fixture
async def shops(place: str) -> AsyncIterator[tuple[Shop, Shop]]:
    """Two workers on one journal; the first one leads."""
    escrow, clock = ScriptedEscrow(), Clock()
    first = await open_shop(place, escrow, clock)
    second = await open_shop(place, escrow, clock)
    yield first, second
    for shop in (first, second):
        await shop.redeemer.stop()
        await shop.stop()


async def test_one_redeems_for_all(shops: tuple[Shop, Shop]) -> None:
    """What any worker earned is redeemed once, by the one that leads."""
    first, second = shops
    for shop in shops:
        await shop.redeemer.start()
    await second.sell(A, 3)
    first.clock.now += 5
    await until(lambda: first.escrow.asked("redeem"))
    await until(lambda: first.journal.unredeemed == 0)
    assert amounts(first.escrow) == [["0.003"]]
    assert not second.link.away


async def test_the_successor_redeems(shops: tuple[Shop, Shop]) -> None:
    """When the worker that redeems is gone, another one does it."""
    first, second = shops
    await second.redeemer.start()
    await first.sell(A)
    await first.stop()
    second.clock.now += 5
    await until(lambda: second.journal.leads)
    await until(lambda: second.journal.unredeemed == 0)
    assert second.escrow.sessions[A].redeemed == 1000


async def test_a_nudge_is_heard_by_any_worker(shops: tuple[Shop, Shop]) -> None:
    """When much is open, the worker that sees it redeems, even if the one that leads is stuck."""
    _, second = shops
    await second.redeemer.start()
    await second.sell(A)
    assert not second.journal.leads
    second.redeemer.nudge()
    await until(lambda: second.journal.unredeemed == 0)


async def test_what_is_late_is_redeemed_by_any_worker(shops: tuple[Shop, Shop]) -> None:
    """While the worker that leads is stopped, another one redeems what is getting late."""
    _, second = shops
    await second.redeemer.start()
    await second.sell(A)
    second.clock.now += 30
    await second.redeemer.contact()
    assert not amounts(second.escrow)
    second.clock.now += 30
    await until(lambda: second.journal.unredeemed == 0)
    assert not second.journal.leads


async def test_any_worker_closes_a_session(shops: tuple[Shop, Shop]) -> None:
    """A close that reaches any worker redeems what all have charged, and ends the session."""
    first, second = shops
    await first.sell(A, 2)
    await second.journal.begin_close(second.claim(A))
    assert await second.redeemer.redeem_session(A, final=True)
    assert second.escrow.sessions[A].state == "settled"
    with pytest.raises(Refused) as refused:
        await admit(first.journal, first.claim(A))
    assert refused.value.reason == "session_closing"


async def test_all_know_that_redeeming_fails(shops: tuple[Shop, Shop]) -> None:
    """If the one that leads cannot redeem, all others know it, and when it is over too."""
    first, second = shops
    await first.redeemer.contact()
    await first.sell(A)
    first.clock.now += 5
    await first.redeemer.start()
    await second.redeemer.start()
    first.escrow.garbage = b"no answer"
    await until(lambda: first.redeemer.failing)
    await until(lambda: second.journal.setting("redeeming_fails"))
    assert second.redeemer.failing
    first.escrow.garbage = None
    await until(lambda: not second.redeemer.failing)


async def test_every_worker_hears_of_a_new_id(shops: tuple[Shop, Shop]) -> None:
    """When one worker finds the book to be a restored backup, each makes its offers anew."""
    first, second = shops
    heard: list[bytes] = []

    async def on_replaced() -> None:
        heard.append(second.journal.journal_id)

    before = first.journal.journal_id
    await second.redeemer.start(on_replaced=on_replaced)
    assert await first.journal.apply_verdicts([Report(B, Atomic(1), Atomic(1), ended=False)])
    await until(lambda: heard)
    assert heard == [first.journal.journal_id] != [before]


async def test_a_worker_that_came_later_is_no_restored_backup(shops: tuple[Shop, Shop]) -> None:
    """What one worker has shown to the escrow is not taken by another for a life it forgot."""
    first, second = shops
    await first.redeemer.contact()
    await first.sell(A, 5)
    await first.redeemer.contact()
    await first.redeemer.contact()
    await second.redeemer.contact()
    assert second.journal.replaced == frozenset()
    assert second.journal.unmet_serial is None

"""Sessions: opened once, paid ahead, kept funded and fresh, ended well, and never misled."""

import asyncio
import logging
from typing import Any

import httpx
import pytest

from tests.client.scripted import LIMITS, ORIGIN, World, many, route, sent_payment, sent_voucher
from tests.support import payments as p
from x402mw.core.amounts import ZERO, Atomic
from x402mw.core.errors import AccountsDiffer, EscrowRefused, EscrowUnavailable
from x402mw.core.strict import b64url_encode
from x402mw_client import Limits, SyncPaymentTransport
from x402mw_client.answers import Word
from x402mw_client.sessions import State, Subject

pytestmark = pytest.mark.anyio


async def test_known_terms_need_one_round_trip(world: World) -> None:
    """The first call to a route probes it; from then on calls are paid ahead."""
    for name in "abc":
        await world.get(f"/item/{name}")
    assert (len(world.provider.requests), world.provider.unpaid) == (4, 1)


async def test_a_hundred_calls_at_once(world: World) -> None:
    """On a fresh session, 100 parallel calls cost one extra round trip and one session."""
    answers = await many(world, [f"/item/{number}" for number in range(100)])
    assert {answer.status_code for answer in answers} == {200}
    assert len(world.provider.requests) == 101
    assert len(world.escrow.sessions) == 1
    assert world.money() == (100_000, 0)


async def test_a_hundred_calls_on_two_routes(world: World) -> None:
    """Each unknown route costs one extra round trip, however many wait for it."""
    paths = [f"/{kind}/{number}" for number in range(50) for kind in ("item", "other")]
    await many(world, paths)
    assert world.provider.unpaid == 2
    assert world.money() == (150_000, 0)


async def test_max_open_holds_back_the_rest(world: World) -> None:
    """With a narrow `max_open` parallel calls take turns, and all come through."""
    world.connect(Limits(per_request="0.01", total="1.00", max_open="0.003"))
    most = 0
    honest = world.provider.honest

    def watch(request: httpx.Request) -> httpx.Response:
        nonlocal most
        most = max(most, sum(s.held for s in world.wallet.state.purse.sessions.values()))
        return honest(request)

    world.provider.honest = watch  # type: ignore[method-assign]
    await many(world, [f"/item/{number}" for number in range(20)])
    assert most <= 3000
    assert world.money() == (20_000, 0)


async def test_headroom_is_used_before_the_total_rises(world: World) -> None:
    """Calls that came cheaper than their maximum leave cover for the next."""
    world.provider.charge = 100
    for _ in range(10):
        await world.get("/item/a")
    totals = [sent_voucher(request).voucher.cumulative for request in world.signed]
    assert totals == [1000 + 100 * number for number in range(10)]


async def test_the_deposit_follows_its_rule(world: World) -> None:
    """A hundred calls' worth is locked, within the wallet's own deposit."""
    await world.get("/item/a")
    world.connect(deposit="0.05")
    await world.get("/item/a")
    assert [s["deposit"] for s in world.escrow.sessions.values()] == [100_000, 50_000]


async def test_a_small_balance_is_locked_whole(world: World) -> None:
    """An account with less than the target locks what it has, if that covers a call."""
    world.escrow.balance = 15_000
    await world.get("/item/a")
    assert world.session.deposit == 15_000
    world.connect()
    with pytest.raises(EscrowRefused):
        await world.get("/item/a")


async def test_top_up_before_the_rest_runs_out(world: World) -> None:
    """Below a tenth of the target the session is filled up again, once."""
    world.connect(deposit="0.01")
    for _ in range(30):
        await world.get("/item/a")
    assert world.escrow.count("/topup") == 2
    assert len(world.escrow.sessions) == 1
    assert world.money() == (30_000, 0)


async def test_a_parallel_top_up_happens_once(world: World) -> None:
    """Many calls that need more cover share one top-up."""
    world.connect(Limits(per_request="0.01", total="1.00", max_open="1.00"), deposit="0.02")
    await many(world, [f"/item/{number}" for number in range(60)])
    assert world.escrow.count("/topup") <= 4
    assert world.money() == (60_000, 0)


async def test_the_token_is_renewed_before_it_ends(world: World) -> None:
    """From 180 s before its end the next call renews it; a failure then can wait."""
    await world.get("/item/a")
    world.clock.now += 419
    await world.get("/item/a")
    assert world.escrow.count("/token") == 0
    world.clock.now += 2
    world.escrow.away = True
    assert (await world.get("/item/a")).text == "ran 3"
    world.escrow.away = False
    await world.get("/item/a")
    assert world.escrow.count("/token") == 0
    world.clock.now += 30
    await world.get("/item/a")
    assert world.escrow.count("/token") == 1
    assert len({sent_payment(request).payload.token for request in world.signed}) == 2


async def test_a_session_near_its_end_takes_no_calls(world: World) -> None:
    """RAM sessions end within the hour; in their last 600 s another one is opened."""
    await world.get("/item/a")
    assert world.session.expires_at == world.clock.now + 3600
    world.clock.now += 3001
    await world.get("/item/a")
    assert len(world.escrow.sessions) == 2


async def test_a_session_that_ended_at_the_escrow(world: World) -> None:
    """If the escrow renews no token, a new session is opened for the call."""
    await world.get("/item/a")
    for session in world.escrow.sessions.values():
        session["status"] = "closing"
    world.clock.now += 500
    assert (await world.get("/item/a")).text == "ran 2"
    assert len(world.escrow.sessions) == 2


# Accounts.


async def test_lost_memory_is_recovered(world: World) -> None:
    """A wallet rolled back to an older state adopts its own newer voucher, and goes on."""
    await world.get("/item/a")
    session = world.session
    before = (session.cumulative, session.charged, session.total_seen)
    for _ in range(3):
        await world.get("/item/a")
    session.cumulative, session.charged, session.total_seen = before
    assert (await world.get("/item/a")).text == "ran 5"
    assert world.money() == (5000, 0)
    assert session.state is State.OPEN


@pytest.mark.parametrize(
    "lie",
    [
        {"charged_total": "900000"},
        {"charged_total": "900000", "voucher": "own"},
        {"charged_total": "2000", "voucher": "forged"},
        {"charged_total": "0", "voucher": "higher"},
        {"charged_total": "9000", "open_total": "9000", "voucher": "higher"},
        {"charged_total": None, "voucher": "higher"},
    ],
    ids=["no proof", "old proof", "forged proof", "falling", "more than signed", "no figures"],
)
async def test_an_inflated_correction_is_not_believed(world: World, lie: dict[str, Any]) -> None:
    """Only our own signature above the highest we remember moves us; else signing stops."""
    await world.get("/item/a")
    await world.get("/item/a")
    session = world.session
    own = world.provider.best[session.id]
    forged = own[:72] + (3000).to_bytes(8, "big") + own[80:]
    proof = lie.pop("voucher", None)
    if proof is not None:
        lie["voucher"] = b64url_encode(forged if proof == "forged" else own)
    if proof == "higher":
        session.cumulative = session.total_seen = session.charged = Atomic(1000)
    before = session.charged
    world.provider.script = [
        world.provider.says(402, "refused", reason="cover", final=False, **lie)
    ]
    with pytest.raises(AccountsDiffer):
        await world.get("/item/a")
    with pytest.raises(AccountsDiffer):
        await world.get("/item/a")
    assert (session.charged, session.state) == (before, State.DIFFERS)
    assert len(world.signed) == 3


async def test_a_charge_above_the_maximum(world: World) -> None:
    """The answer is delivered, no more than the maximum is booked, and signing stops."""
    await world.get("/item/a")
    world.provider.script = [world.provider.says(200, "settled", charge=5000)]
    assert (await world.get("/item/a")).text == "said"
    assert world.money() == (2000, 0)
    with pytest.raises(AccountsDiffer):
        await world.get("/item/a")


async def test_a_total_above_the_sum_of_charges(world: World) -> None:
    """With nothing open, the largest total must be our own sum."""
    await world.get("/item/a")
    world.provider.script = [world.provider.says(200, "settled", charge=1000, charged_total="2001")]
    await world.get("/item/a")
    with pytest.raises(AccountsDiffer):
        await world.get("/item/a")


async def test_totals_that_overtake_each_other_are_fine(world: World) -> None:
    """Answers in any order never look like a difference: the largest total counts."""
    await world.get("/item/a")
    purse, session = world.wallet.state.purse, world.session
    subject = Subject("GET", ORIGIN, "/item/a", b"x" * 32, ORIGIN)
    calls = [purse.sign(session, session.offer, subject, None) for _ in range(3)]
    for call, total in zip(calls, ("4000", "2000", "3000"), strict=True):
        assert call is not None
        word = Word("settled", "", True, Atomic(1000), "", Atomic(int(total)), Atomic(0))
        purse.settle(call[0], 1000, word)
    assert (session.charged, session.state) == (4000, State.OPEN)


# The end of a session.


async def test_closing_returns_the_rest(world: World) -> None:
    """Closing the transport closes the session at the provider; the receipt is checked."""
    await world.get("/item/a")
    await world.close()
    assert world.session.state is State.CLOSED
    assert world.escrow.count("/close") == 0
    assert world.wallet.summary().paid == "0.001"


@pytest.mark.parametrize("cause", ["away", "gone", "foreign", "forged", "inflated"])
async def test_closing_without_the_provider(
    world: World, cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    """If the provider does not close properly, the escrow does."""
    caplog.set_level(logging.CRITICAL, "x402mw.client")
    await world.get("/item/a")
    account = world.provider.accounts[world.session.id]
    inflated = p.replace(account, charged=Atomic(5000))

    def away(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("away")

    def closed_with(receipt: str) -> Any:
        return lambda request: httpx.Response(200, json={"receipt": receipt})

    receipt, session = world.provider.receipt, world.session.id
    world.provider.control_script = [
        {
            "away": away,
            "gone": world.provider.answer(404),
            "foreign": closed_with(receipt(b"x" * 16, account, final=True)),
            "forged": closed_with(receipt(session, account, final=True, seed=p.BUYER)),
            "inflated": closed_with(receipt(session, inflated, final=True)),
        }[cause]
    ]
    await world.close()
    assert world.escrow.count("/close") == 1
    assert world.money() == (1000, 0)


async def test_a_close_that_takes_time(world: World) -> None:
    """202 with `Retry-After` is asked again, with a fresh seq."""
    await world.get("/item/a")
    world.provider.control_script = [world.provider.answer(202, Retry_After="0")] * 2
    await world.close()
    asked = [r for r in world.provider.requests if r.url.path == p.QUOTE.control]
    assert len({sent_voucher(request).voucher.seq for request in asked}) == 3
    assert world.session.state is State.CLOSED


async def test_a_call_nobody_waited_for_is_asked_for(world: World) -> None:
    """A held call is learnt by control; one that never came is freed once it is dead."""
    world.connect(Limits(per_request="0.01", total="0.0025"))
    for action in (world.provider.answer(200, serve=True), world.provider.answer(200)):
        world.provider.script = [action]
        await world.get("/item/a")
    assert world.money() == (0, 2000)
    with pytest.raises(Exception, match="total"):
        await world.get("/other/a")
    assert world.money() == (1000, 1000)
    world.clock.now += 421
    assert (await world.get("/item/a")).text == "ran 2"
    assert world.money() == (2000, 0)


async def test_lost_sessions_are_closed_on_demand(world: World) -> None:
    """Sessions whose keys are gone are found through the account, and their rest returns."""
    await world.get("/item/a")
    world.connect()
    await world.get("/item/a")
    wallet = world.wallet
    if world.kind == "async":
        assert await wallet.close_lost_sessions() == 1
    else:
        assert wallet.close_lost_sessions_sync() == 1
    assert [s["status"] for s in world.escrow.sessions.values()] == ["closing", "locked"]


async def test_events_tell_no_secrets(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """The log names amounts, sessions and URLs, but no key, token, voucher or query."""
    caplog.set_level(logging.DEBUG, "x402mw.client")
    paid: list[Any] = []
    world.connect(LIMITS, on_payment=paid.append)
    await world.get("/item/a?key=hidden")
    text = caplog.text + repr(world.wallet) + repr(paid) + repr(world.session)
    assert "paid 0.001" in text
    assert [event.charge for event in paid] == [1000]
    payment = sent_payment(world.signed[0]).payload
    secrets = ("hidden", "pf_live", payment.token, payment.voucher, world.session.seed.hex())
    assert not [secret for secret in secrets if secret in text]


async def test_a_metered_route(world: World) -> None:
    """A metered call holds its maximum, and costs what was used."""
    world.provider.routes = [route("GET", "/item/{name}", 8000)]
    world.provider.charge = 14
    await world.get("/item/a")
    assert world.money() == (14, 0)


async def test_a_failed_opening_is_everybodys_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers who waited for one opening share its failure: the escrow is not asked by each."""
    monkeypatch.setattr("x402mw_client.operations.PAUSES_SECONDS", (0.0,))
    world = World("async")
    await world.get("/item/a")
    world.session.state = State.ENDED
    asked = 0

    async def slow(request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.01)
        raise httpx.ConnectError("away")

    world.transport._escrow._client = httpx.AsyncClient(transport=httpx.MockTransport(slow))
    calls = [world.get(f"/item/{number}") for number in range(20)]
    found = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(error).__name__ for error in found} == {"EscrowUnavailable"}
    assert asked == 1


async def test_a_hanging_probe_holds_nobody_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others wait at most a moment for the head of a probe."""
    monkeypatch.setattr("x402mw_client.flow.PROBE_SECONDS", 0.02)
    world = World("async")
    hangs = asyncio.Event()

    async def answer(request: httpx.Request) -> httpx.Response:
        if not hangs.is_set():
            hangs.set()
            await asyncio.Event().wait()
        return world.provider(request)

    world.transport._driver._inner = httpx.MockTransport(answer)
    first = asyncio.create_task(world.get("/item/a"))
    await hangs.wait()
    assert (await world.get("/item/b")).text == "ran 1"
    first.cancel()


def test_both_transports_may_share_a_wallet() -> None:
    """One wallet, one session, whatever the transport: its limits hold for all of them."""
    world = World("async")
    asyncio.run(world.get("/item/a"))
    other = SyncPaymentTransport(world.wallet, world.inner, keep_sessions=True)
    with httpx.Client(transport=other) as http:
        assert http.get(f"{ORIGIN}/item/a").text == "ran 2"
    assert len(world.escrow.sessions) == 1
    assert world.wallet.spent == 2000


async def test_a_top_up_takes_what_the_account_has(world: World) -> None:
    """With too little for a whole top-up, what covers the call is added; else it is refused."""
    world.connect(deposit="0.01")
    world.escrow.balance = 12_000
    for _ in range(12):
        await world.get("/item/a")
    assert (world.session.deposit, world.money()) == (12_000, (12_000, 0))
    with pytest.raises(EscrowRefused):
        await world.get("/item/a")


async def test_an_expired_token_needs_the_escrow(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the token expired and the escrow away nothing is signed; later it goes on."""
    monkeypatch.setattr("x402mw_client.operations.PAUSES_SECONDS", (0.0,))
    await world.get("/item/a")
    world.clock.now += 601
    world.escrow.away = True
    with pytest.raises(EscrowUnavailable):
        await world.get("/item/a")
    assert len(world.signed) == 1
    world.escrow.away = False
    assert (await world.get("/item/a")).text == "ran 2"


async def test_what_was_open_when_memory_was_lost(world: World) -> None:
    """The open total of an adopted correction stays held until the provider shows none open."""
    await world.get("/item/a")
    session = world.session
    before = (session.cumulative, session.charged, session.total_seen)
    for _ in range(3):
        await world.get("/item/a")
    session.cumulative, session.charged, session.total_seen = before
    account = world.provider.accounts[session.id]
    running = p.replace(account, charged=Atomic(3000), reserved=Atomic(1000))
    world.provider.accounts[session.id] = running
    world.clock.now += 1
    assert (await world.get("/item/a")).text == "ran 5"
    assert world.money() == (4000, 1000)
    settled = p.replace(world.provider.accounts[session.id], charged=Atomic(4700), reserved=ZERO)
    world.provider.accounts[session.id] = settled
    await world.get("/item/a")
    assert (world.money(), session.state) == ((5700, 0), State.OPEN)

"""Sessions: opened once, paid ahead, kept funded and fresh."""

import asyncio

import httpx
import pytest

from tests.client.scripted import ORIGIN, sent_payment, sent_voucher
from tests.client.world import World, many
from x402mw.core.errors import EscrowRefused, EscrowUnavailable
from x402mw_client import Limits, SyncPaymentTransport
from x402mw_client.sessions import State

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
    monkeypatch.setattr("x402mw_client.probing.PROBE_SECONDS", 0.02)
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

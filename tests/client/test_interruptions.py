"""One wallet under threads, an event loop and cancellation: nothing leaks and no limit bends."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.client.scripted import ORIGIN
from tests.client.world import World
from x402mw.core.errors import ConfigurationError, LimitExceeded
from x402mw_client import Limits, PaymentTransport, SyncPaymentTransport

pytestmark = pytest.mark.anyio


def slow(
    answer: Callable[[httpx.Request], httpx.Response], *, after: int = 0
) -> httpx.MockTransport:
    """Answers after one turn of the loop, and comes back after `after` more."""

    async def handler(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0)
        found = answer(request)
        for _ in range(after):
            await asyncio.sleep(0)
        return found

    return httpx.MockTransport(handler)


def nothing_left(world: World) -> bool:
    """Nobody is inside a section, probing, waited for or waiting."""
    state = world.wallet.state
    calls = [call for session in state.purse.sessions.values() for call in session.calls.values()]
    return not (
        state.sections._inside
        or state.gate._probing
        or state.signal._waiters
        or [call for call in calls if call.in_flight]
    )


@pytest.mark.parametrize("streamed", [False, True], ids=["settled", "open"])
async def test_cancelled_anywhere(streamed: bool) -> None:
    """Cancelled at any await, a call leaves no lock taken, no money lost, and a true account."""
    for turns in range(200):
        world = World("async")
        world.provider.unfinished = streamed
        world.transport._driver._inner = slow(world.provider, after=1)
        world.transport._escrow._client = httpx.AsyncClient(transport=slow(world.escrow, after=1))
        task = asyncio.create_task(world.get("/item/a"))
        for _ in range(turns):
            await asyncio.sleep(0)
        done = task.done()
        task.cancel()
        await asyncio.wait([task])
        assert nothing_left(world), turns
        world.provider.unfinished = False
        assert (await world.get("/item/b")).status_code == 200, turns
        assert len(world.escrow.sessions) == 1, turns
        await world.close()
        charged = sum(account.charged for account in world.provider.accounts.values())
        assert world.money() == (charged, 0), turns
        if done:
            return
    pytest.fail("the call never ended")


async def test_a_timeout_around_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many calls with a deadline of their own: who gives up takes nobody else along."""
    world = World("async")
    world.transport._driver._inner = slow(world.provider, after=3)
    world.transport._escrow._client = httpx.AsyncClient(transport=slow(world.escrow, after=3))

    async def call(number: int) -> int:
        try:
            async with asyncio.timeout(0.0005 * number):
                return int((await world.get(f"/item/{number}")).status_code)
        except TimeoutError:
            return 0

    found = await asyncio.gather(*(call(number) for number in range(60)))
    assert set(found) <= {0, 200}
    assert nothing_left(world)
    assert (await world.get("/item/a")).status_code == 200
    assert len(world.escrow.sessions) == 1


async def test_a_forked_process_signs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of a wallet in another process would spend every limit a second time."""
    world = World("async")
    await world.get("/item/a")
    with monkeypatch.context() as forked:
        forked.setattr("os.getpid", lambda: 1)
        with pytest.raises(ConfigurationError, match="process"):
            await world.get("/item/a")
    assert (await world.get("/item/a")).text == "ran 2"


def test_threads_and_a_loop_share_one_wallet() -> None:
    """Limits hold to the unit for threads and event loops at once, and every call is booked."""
    world = World("sync")
    world.connect(Limits(per_request="0.01", total="0.15", max_open="0.02"))
    lock = threading.Lock()

    def provider(request: httpx.Request) -> httpx.Response:
        with lock:
            most.append(world.wallet.state.purse.spent())
            return world.provider(request)

    most: list[int] = []
    inner = httpx.MockTransport(provider)

    def plain(number: int) -> int:
        transport = SyncPaymentTransport(world.wallet, inner, keep_sessions=True)
        with httpx.Client(transport=transport) as http:
            return sum(paid(lambda: http.get(f"{ORIGIN}/item/{number}")) for _ in range(25))

    def paid(call: Callable[[], httpx.Response]) -> bool:
        try:
            return call().status_code == 200
        except LimitExceeded:
            return False

    async def loop() -> int:
        async def one(number: int) -> bool:
            try:
                return (await http.get(f"{ORIGIN}/other/{number}")).status_code == 200
            except LimitExceeded:
                return False

        transport = PaymentTransport(world.wallet, inner, keep_sessions=True)
        async with httpx.AsyncClient(transport=transport) as http:
            return sum(await asyncio.gather(*(one(number) for number in range(50))))

    with ThreadPoolExecutor(6) as pool:
        looping = pool.submit(lambda: asyncio.run(loop()))
        items = sum(pool.map(plain, range(4)))
        others = looping.result()
    charged, held = world.money()
    assert (charged, held) == (items * 1000 + others * 2000, 0)
    assert charged == sum(account.charged for account in world.provider.accounts.values())
    assert 149_000 <= max(most) <= 150_000
    assert nothing_left(world)

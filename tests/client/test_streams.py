"""Answers pass through: streams unbuffered, connections used again, and cancelling is safe."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.client.scripted import ORIGIN
from tests.client.world import World

pytestmark = pytest.mark.anyio


class Chunks(httpx.AsyncByteStream):
    """An answer that is produced only as it is read; `more` lets the next chunk out."""

    def __init__(self) -> None:
        self.more = asyncio.Event()
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"first"
        await self.more.wait()
        yield b"second"

    async def aclose(self) -> None:
        self.closed = True


@pytest.fixture
def world() -> World:
    """The async half only: the sync transport hands over the inner answer in the same way."""
    return World("async")


def streaming(world: World, chunks: Chunks) -> None:
    """Makes paid answers of the provider stream."""
    honest = world.provider.honest

    def answer(request: httpx.Request) -> httpx.Response:
        found = honest(request)
        if "PAYMENT-SIGNATURE" not in request.headers:
            return found
        del found.headers["content-length"]
        return httpx.Response(found.status_code, headers=found.headers, stream=chunks)

    world.provider.honest = answer  # type: ignore[method-assign]


async def test_the_first_bytes_come_before_the_last(world: World) -> None:
    """A streamed answer reaches the caller chunk by chunk, headers first."""
    chunks = Chunks()
    streaming(world, chunks)
    async with world.http.stream("GET", f"{ORIGIN}/item/a", headers={}) as answer:
        found = answer.aiter_raw()
        assert await anext(found) == b"first"
        chunks.more.set()
        assert await anext(found) == b"second"
    assert chunks.closed


async def test_an_answer_that_is_not_used_is_closed(world: World) -> None:
    """The 402 of a probe is read and closed, so that its connection can be used again."""
    closed: list[str] = []

    class Body(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield b"terms"
            closed.append("read")

        async def aclose(self) -> None:
            closed.append("closed")

    honest = world.provider.honest

    def answer(request: httpx.Request) -> httpx.Response:
        found = honest(request)
        if found.status_code == 402:
            return httpx.Response(402, headers=found.headers, stream=Body())
        return found

    world.provider.honest = answer  # type: ignore[method-assign]
    assert (await world.get("/item/a")).text == "ran 1"
    assert closed == ["read", "closed"]


async def test_a_cancelled_call_stays_held(world: World) -> None:
    """Who stops waiting has not stopped the call: its amount stays held, and others go on."""
    await world.get("/item/a")
    started = asyncio.Event()

    class Hanging(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            started.set()
            await asyncio.Event().wait()
            raise AssertionError

    inner, world.transport._driver._inner = world.transport._driver._inner, Hanging()
    task = asyncio.create_task(world.get("/item/a"))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    world.transport._driver._inner = inner
    assert world.money() == (1000, 1000)
    assert [call.in_flight for call in world.session.calls.values()] == [False]
    assert (await world.get("/item/a")).text == "ran 2"


async def test_a_cancelled_opening_lets_the_next_one_open(world: World) -> None:
    """Whoever was inside a section leaves it when cancelled."""
    started = asyncio.Event()
    handler = world.escrow.__call__

    class Slow(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if request.method == "POST" and not started.is_set():
                started.set()
                await asyncio.Event().wait()
            return handler(request)

    escrow = world.transport._escrow
    escrow._client = httpx.AsyncClient(transport=Slow())
    first = asyncio.create_task(world.get("/item/a"))
    await started.wait()
    second = asyncio.create_task(world.get("/item/b"))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).text == "ran 1"
    assert len(world.escrow.sessions) == 1

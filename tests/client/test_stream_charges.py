"""Streamed answers: what they cost is known right after their body, and never asked for before."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from tests.client.scripted import ORIGIN
from tests.client.world import LIMITS, World

pytestmark = pytest.mark.anyio


class Chunks(httpx.AsyncByteStream, httpx.SyncByteStream):
    """An answer of two chunks; notes what is done with it."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes

    def __iter__(self) -> Iterator[bytes]:
        for chunk in (b"first", b"second"):
            self.notes.append(f"gave {chunk.decode()}")
            yield chunk

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self:
            yield chunk

    def close(self) -> None:
        self.notes.append("closed")

    async def aclose(self) -> None:
        self.close()


@pytest.fixture
def notes(world: World) -> list[str]:
    """What happened, in order; from now on paid answers stream and keep their figure back."""
    found: list[str] = []
    honest, control = world.provider.honest, world.provider.control
    world.provider.unfinished, world.provider.charge = True, 300

    def stream(request: httpx.Request) -> httpx.Response:
        answer = honest(request)
        if "PAYMENT-SIGNATURE" not in request.headers:
            return answer
        del answer.headers["content-length"]
        return httpx.Response(answer.status_code, headers=answer.headers, stream=Chunks(found))

    def ask(request: httpx.Request) -> httpx.Response:
        found.append("asked")
        return control(request)

    world.provider.honest, world.provider.control = stream, ask  # type: ignore[method-assign]
    return found


@asynccontextmanager
async def opened(world: World) -> AsyncIterator[Any]:
    """An answer whose body is read by the test."""
    if world.kind == "async":
        async with world.http.stream("GET", f"{ORIGIN}/item/a") as answer:
            yield answer
    else:
        with world.http.stream("GET", f"{ORIGIN}/item/a") as answer:
            yield answer


async def first_chunk(world: World, answer: Any) -> bytes:
    """Reads one chunk and no more."""
    chunks = answer.aiter_raw() if world.kind == "async" else answer.iter_raw()
    found: bytes = await anext(chunks) if world.kind == "async" else next(chunks)
    return found


async def test_the_charge_is_known_right_after_the_body(world: World, notes: list[str]) -> None:
    """After the last chunk, and one question, the figure is final; the chunks are untouched."""
    answer = await world.get("/item/a")
    assert answer.content == b"firstsecond"
    assert notes == ["gave first", "gave second", "closed", "asked"]
    assert answer.extensions["x402mw_payment"].charge == 300
    assert (world.wallet.spent, world.money()) == (300, (300, 0))


async def test_nothing_is_asked_while_it_streams(world: World, notes: list[str]) -> None:
    """The figure is open until the caller is done; closing early is being done."""
    async with opened(world) as answer:
        paid = answer.extensions["x402mw_payment"]
        assert await first_chunk(world, answer) == b"first"
        assert (paid.charge, paid.amount, world.money()) == (None, 1000, (0, 1000))
        assert notes == ["gave first"]
    assert notes == ["gave first", "closed", "asked"]
    assert (paid.charge, world.money()) == (300, (300, 0))


async def test_a_settled_answer_asks_nothing(world: World, notes: list[str]) -> None:
    """Who told the figure is not asked for it."""
    world.provider.unfinished = False
    answer = await world.get("/item/a")
    assert "asked" not in notes
    assert answer.extensions["x402mw_payment"].charge == 300


async def test_a_figure_that_comes_a_moment_later(
    world: World, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the provider still runs the call it is asked once more, and then left alone."""
    monkeypatch.setattr("x402mw_client.control.LEARN_PAUSES", (0.0, 0.001))
    later = {"charged": "0", "open": "1000", "receipt": ""}
    later["seq"] = {"state": "open", "charge": "0", "final": False}  # type: ignore[assignment]
    world.provider.control_script = [lambda request: httpx.Response(200, json=later)]
    await world.get("/item/a")
    assert world.money() == (300, 0)
    world.provider.control_script = [lambda request: httpx.Response(200, json=later)] * 3
    await world.get("/item/a")
    assert (len(world.provider.control_script), world.money()) == (1, (300, 1000))


@pytest.mark.parametrize("cause", ["away", "garbage", "refused"])
async def test_a_question_that_fails_is_silent(world: World, notes: list[str], cause: str) -> None:
    """The caller has its answer whatever becomes of the question; the amount stays held."""

    def away(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("away")

    answers = {
        "away": away,
        "garbage": lambda request: httpx.Response(200, content=b"\xff"),
        "refused": world.provider.answer(429, Retry_After="60"),
    }
    world.provider.control_script = [answers[cause]] * 2
    answer = await world.get("/item/a")
    assert answer.content == b"firstsecond"
    assert answer.extensions["x402mw_payment"].charge is None
    assert world.money() == (0, 1000)


async def test_who_asked_too_often_is_quiet(world: World, notes: list[str]) -> None:
    """After a 429 nothing is asked for as long as it says; what is held by then is learnt later."""
    world.connect(replace(LIMITS, total="0.0045"))
    world.provider.control_script = [world.provider.answer(429, Retry_After="30")]
    for _ in range(4):
        await world.get("/item/a")
    assert (notes.count("asked"), world.money()) == (0, (0, 4000))
    assert not world.provider.control_script
    world.clock.now += 30
    await world.get("/item/a")
    assert world.money() == (5 * 300, 0)


async def test_whoever_was_cancelled_is_not_kept_waiting() -> None:
    """A task that is cancelled while it reads ends at once; the charge is learnt later."""
    world = World("async")
    notes: list[str] = []
    honest = world.provider.honest
    world.provider.unfinished = True
    reading = asyncio.Event()

    class Endless(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield b"first"
            reading.set()
            await asyncio.Event().wait()

        async def aclose(self) -> None:
            notes.append("closed")

    def stream(request: httpx.Request) -> httpx.Response:
        answer = honest(request)
        if "PAYMENT-SIGNATURE" not in request.headers:
            return answer
        del answer.headers["content-length"]
        return httpx.Response(answer.status_code, headers=answer.headers, stream=Endless())

    world.provider.honest = stream  # type: ignore[method-assign]
    task = asyncio.create_task(world.get("/item/a"))
    await reading.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert notes == ["closed"]
    assert world.money() == (0, 1000)

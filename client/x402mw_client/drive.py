"""The two loops that carry out the steps of a story, and nothing else: one async, one plain.

An answer that the story goes on from is read to a small bound and closed, so that its connection
can be used again; the one that ends the story passes through untouched.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, TypeVar

import httpx

from x402mw.core import headers
from x402mw_client.escrow import AsyncEscrow, SyncEscrow
from x402mw_client.steps import (
    After,
    Ask,
    Control,
    Discard,
    Outgoing,
    Read,
    Send,
    Sleep,
    Step,
    Story,
    Take,
    Wait,
)
from x402mw_client.waiting import Signal

T = TypeVar("T")

DRAIN_BYTES = 64 * 1024
DRAIN_SECONDS = 5.0
CONTROL_TIMEOUT_SECONDS = 5.0
# Control answers are small; what somebody compressed on the way is not read.
_CODED = (b"content-encoding", b"transfer-encoding", b"content-length")


def tidy(story: Story[T], kept: list[httpx.Response]) -> Story[T]:
    """Tells a story with the clearing up it leaves out: an answer it goes on from is discarded.

    `kept` holds the answer that is not closed yet, unless it is the story's own result.
    """
    result: Any = None
    error: Exception | None = None
    try:
        while True:
            step = story.send(result) if error is None else story.throw(error)
            if isinstance(step, Send) and kept:
                yield Discard(kept.pop())
            result = error = None
            try:
                result = yield step
            except Exception as raised:
                error = raised
            if isinstance(step, Send) and error is None:
                kept.append(result)
    except StopIteration as end:
        if kept and kept[-1] is end.value:
            kept.clear()
        value: T = end.value
        return value
    finally:
        story.close()


class AsyncDriver:
    """Carries out stories in an event loop."""

    def __init__(
        self, inner: httpx.AsyncBaseTransport, escrow: AsyncEscrow, signal: Signal
    ) -> None:
        self._inner, self._escrow, self._signal = inner, escrow, signal

    async def run(self, story: Story[T], outgoing: Outgoing | None = None) -> T:
        """Runs a story to its end. `outgoing` is the request that its `Send` steps send."""
        kept: list[httpx.Response] = []
        steps = tidy(story, kept)
        try:
            step = next(steps)
            while True:
                try:
                    result = await self._carry_out(step, outgoing)
                except Exception as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(result)
        except StopIteration as end:
            value: T = end.value
            return value
        finally:
            steps.close()
            for answer in kept:
                await answer.aclose()

    async def _carry_out(self, step: Step, outgoing: Outgoing | None) -> Any:
        match step:
            case Send(signature) if outgoing is not None:
                return await self._inner.handle_async_request(message(outgoing, signature))
            case Control():
                return await self._control(control_message(step))
            case Read(answer):
                return await answer.aread()
            case Take(answer):
                return await _take_async(answer)
            case Discard(answer):
                return await _read_async(answer)
            case After(answer, story):
                answer.stream = _ThenAsync(answer.stream, lambda: self.run(story))
                return None
            case Ask(operation):
                return await self._escrow.run(operation)
            case Sleep(seconds):
                return await asyncio.sleep(seconds)
            case Wait(condition, seconds):
                return await self._signal.wait_async(condition, seconds)
        raise AssertionError(type(step))

    async def _control(self, request: httpx.Request) -> httpx.Response:
        try:
            async with asyncio.timeout(CONTROL_TIMEOUT_SECONDS):
                answer = await self._inner.handle_async_request(request)
        except TimeoutError:
            raise httpx.ReadTimeout("no answer to a control request", request=request) from None
        return await _read_async(answer)


class SyncDriver:
    """Carries out stories in a plain thread."""

    def __init__(self, inner: httpx.BaseTransport, escrow: SyncEscrow, signal: Signal) -> None:
        self._inner, self._escrow, self._signal = inner, escrow, signal

    def run(self, story: Story[T], outgoing: Outgoing | None = None) -> T:
        """Runs a story to its end. `outgoing` is the request that its `Send` steps send."""
        kept: list[httpx.Response] = []
        steps = tidy(story, kept)
        try:
            step = next(steps)
            while True:
                try:
                    result = self._carry_out(step, outgoing)
                except Exception as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(result)
        except StopIteration as end:
            value: T = end.value
            return value
        finally:
            steps.close()
            for answer in kept:
                answer.close()

    def _carry_out(self, step: Step, outgoing: Outgoing | None) -> Any:
        match step:
            case Send(signature) if outgoing is not None:
                return self._inner.handle_request(message(outgoing, signature))
            case Control():
                return _read(self._inner.handle_request(control_message(step)))
            case Read(answer):
                return answer.read()
            case Take(answer):
                return _take(answer)
            case Discard(answer):
                return _read(answer)
            case After(answer, story):
                answer.stream = _Then(answer.stream, lambda: self.run(story))
                return None
            case Ask(operation):
                return self._escrow.run(operation)
            case Sleep(seconds):
                return time.sleep(seconds)
            case Wait(condition, seconds):
                return self._signal.wait(condition, seconds)
        raise AssertionError(type(step))


# Answers that something follows. httpx closes a stream at its end as well as before it.


class _ThenAsync(httpx.AsyncByteStream):
    """An answer's stream, passed through as it is, and what follows once it is closed."""

    def __init__(self, stream: Any, then: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._stream, self._then = stream, [then]

    def __aiter__(self) -> AsyncIterator[bytes]:
        found: AsyncIterator[bytes] = aiter(self._stream)
        return found

    async def aclose(self) -> None:
        await self._stream.aclose()
        task = asyncio.current_task()
        # Who was cancelled is not kept waiting.
        if self._then and not (task and task.cancelling()):
            await self._then.pop()()


class _Then(httpx.SyncByteStream):
    """The same for plain code."""

    def __init__(self, stream: Any, then: Callable[[], None]) -> None:
        self._stream, self._then = stream, [then]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._stream)

    def close(self) -> None:
        self._stream.close()
        if self._then:
            self._then.pop()()


# Requests.


class _OneBody(httpx.AsyncByteStream, httpx.SyncByteStream):
    """A body that is too long to keep, sent once: what was read of it, then the rest."""

    def __init__(self, outgoing: Outgoing) -> None:
        self._stream = outgoing.stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if isinstance(self._stream, AsyncIterator):
            async for chunk in self._stream:
                yield chunk

    def __iter__(self) -> Iterator[bytes]:
        if isinstance(self._stream, Iterator):
            yield from self._stream


def message(outgoing: Outgoing, signature: str | None) -> httpx.Request:
    """One sending of the caller's request; the caller's own object is never touched."""
    request = outgoing.request
    found = httpx.Headers(request.headers)
    if signature is not None:
        found[headers.PAYMENT_SIGNATURE] = signature
    body = outgoing.content
    return httpx.Request(
        request.method,
        request.url,
        headers=found,
        stream=_OneBody(outgoing) if body is None else httpx.ByteStream(body),
        extensions=request.extensions,
    )


def control_message(step: Control) -> httpx.Request:
    """A request to a provider's control path."""
    return httpx.Request(
        "POST",
        step.url,
        headers={"Content-Type": "application/json", headers.PAYMENT_SIGNATURE: step.signature},
        content=step.body,
        extensions={"timeout": httpx.Timeout(CONTROL_TIMEOUT_SECONDS).as_dict()},
    )


# Bodies.


async def _take_async(answer: httpx.Response) -> None:
    """Takes the bytes of a body in; one that breaks off leaves an empty answer, and raises."""
    stream, answer.stream = answer.stream, httpx.ByteStream(b"")
    taken = bytearray()
    try:
        async for chunk in stream:  # type: ignore[union-attr]  # an async transport's
            taken += chunk
    finally:
        await stream.aclose()  # type: ignore[union-attr]  # an async transport's
    answer.stream = httpx.ByteStream(bytes(taken))


def _take(answer: httpx.Response) -> None:
    stream, answer.stream = answer.stream, httpx.ByteStream(b"")
    try:
        taken = b"".join(stream)  # type: ignore[arg-type]  # a sync transport's
    finally:
        stream.close()  # type: ignore[union-attr]  # a sync transport's
    answer.stream = httpx.ByteStream(taken)


async def _read_async(answer: httpx.Response) -> httpx.Response:
    """Reads an answer within bounds and closes it; what is cut off or broken is just shorter."""
    taken = bytearray()
    try:
        with contextlib.suppress(httpx.TransportError, TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                async for chunk in answer.stream:  # type: ignore[union-attr]  # an async one's
                    taken += chunk
                    if len(taken) > DRAIN_BYTES:
                        break
    finally:
        await answer.aclose()
    return _whole(answer, bytes(taken))


def _read(answer: httpx.Response) -> httpx.Response:
    taken, deadline = bytearray(), time.monotonic() + DRAIN_SECONDS
    try:
        with contextlib.suppress(httpx.TransportError):
            for chunk in answer.stream:  # type: ignore[union-attr]  # a sync transport's
                taken += chunk
                if len(taken) > DRAIN_BYTES or time.monotonic() > deadline:
                    break
    finally:
        answer.close()
    return _whole(answer, bytes(taken))


def _whole(answer: httpx.Response, content: bytes) -> httpx.Response:
    kept = [(name, value) for name, value in answer.headers.raw if name.lower() not in _CODED]
    return httpx.Response(answer.status_code, headers=kept, content=content)


async def read_request_async(request: httpx.Request, limit: int) -> Outgoing:
    """Reads a request's body up to `limit` bytes; a longer one can be sent only once."""
    stream = aiter(request.stream)  # type: ignore[arg-type]  # httpx has checked its kind
    taken: list[bytes] = []
    size = 0
    async for chunk in stream:
        taken.append(chunk)
        size += len(chunk)
        if size > limit:
            return Outgoing(request, None, _chain_async(taken, stream))
    return Outgoing(request, b"".join(taken))


def read_request(request: httpx.Request, limit: int) -> Outgoing:
    """The same for plain code."""
    stream = iter(request.stream)  # type: ignore[arg-type]  # httpx has checked its kind
    taken: list[bytes] = []
    size = 0
    for chunk in stream:
        taken.append(chunk)
        size += len(chunk)
        if size > limit:
            return Outgoing(request, None, _chain(taken, stream))
    return Outgoing(request, b"".join(taken))


async def _chain_async(taken: list[bytes], rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    for chunk in taken:
        yield chunk
    async for chunk in rest:
        yield chunk


def _chain(taken: list[bytes], rest: Iterator[bytes]) -> Iterator[bytes]:
    yield from taken
    yield from rest

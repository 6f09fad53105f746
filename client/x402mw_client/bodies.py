"""Bodies on the wire: the caller's request as often as it is sent, and answers within bounds.

An answer that the story goes on from is read to a small bound and closed, so that its connection
can be used again; the one that ends the story passes through untouched.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator

import httpx

from x402mw.core import headers
from x402mw_client.steps import Control, Outgoing

DRAIN_BYTES = 64 * 1024
DRAIN_SECONDS = 5.0
CONTROL_TIMEOUT_SECONDS = 5.0
# Control answers are small; what somebody compressed on the way is not read.
_CODED = (b"content-encoding", b"transfer-encoding", b"content-length")


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
    body = outgoing.content
    sent = httpx.Request(
        request.method,
        request.url,
        headers=request.headers,
        stream=_OneBody(outgoing) if body is None else httpx.ByteStream(body),
        extensions=request.extensions,
    )
    if signature is not None:
        sent.headers[headers.PAYMENT_SIGNATURE] = signature
    return sent


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


async def take_async(answer: httpx.Response) -> None:
    """Takes the bytes of a body in; one that breaks off leaves an empty answer, and raises."""
    stream, answer.stream = answer.stream, httpx.ByteStream(b"")
    taken = bytearray()
    try:
        async for chunk in stream:  # type: ignore[union-attr]  # an async transport's
            taken += chunk
    finally:
        await stream.aclose()  # type: ignore[union-attr]  # an async transport's
    answer.stream = httpx.ByteStream(bytes(taken))


def take(answer: httpx.Response) -> None:
    """The same for plain code."""
    stream, answer.stream = answer.stream, httpx.ByteStream(b"")
    try:
        taken = b"".join(stream)  # type: ignore[arg-type]  # a sync transport's
    finally:
        stream.close()  # type: ignore[union-attr]  # a sync transport's
    answer.stream = httpx.ByteStream(taken)


async def read_answer_async(answer: httpx.Response) -> httpx.Response:
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


def read_answer(answer: httpx.Response) -> httpx.Response:
    """The same for plain code."""
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


async def read_request_async(request: httpx.Request, origin: str, limit: int) -> Outgoing:
    """Reads a request's body up to `limit` bytes; a longer one can be sent only once."""
    if isinstance(request.stream, httpx.ByteStream):
        return read_request(request, origin, limit)
    stream = aiter(request.stream)  # type: ignore[arg-type]  # httpx has checked its kind
    taken: list[bytes] = []
    size = 0
    async for chunk in stream:
        taken.append(chunk)
        size += len(chunk)
        if size > limit:
            return Outgoing(request, origin, None, _chain_async(taken, stream))
    return Outgoing(request, origin, b"".join(taken))


def read_request(request: httpx.Request, origin: str, limit: int) -> Outgoing:
    """The same for plain code."""
    stream = iter(request.stream)  # type: ignore[arg-type]  # httpx has checked its kind
    taken: list[bytes] = []
    size = 0
    for chunk in stream:
        taken.append(chunk)
        size += len(chunk)
        if size > limit:
            return Outgoing(request, origin, None, _chain(taken, stream))
    return Outgoing(request, origin, b"".join(taken))


async def _chain_async(taken: list[bytes], rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    for chunk in taken:
        yield chunk
    async for chunk in rest:
        yield chunk


def _chain(taken: list[bytes], rest: Iterator[bytes]) -> Iterator[bytes]:
    yield from taken
    yield from rest

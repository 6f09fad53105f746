"""Connections for many calls at once: a few small pools instead of one large one.

What one call costs in an httpx pool grows with the pool's connections and with the calls that wait
for one, so a thousand calls at once cost a hundred times what they cost one by one. Here each pool
is small, and no more calls are let in than there are connections.
"""

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx

POOLS = 10
CONNECTIONS = 10
"""Of each pool."""
CALLS_AT_ONCE = POOLS * CONNECTIONS


class SmallPools(httpx.AsyncBaseTransport):
    """Sends each request through the pool that has the least to do."""

    def __init__(self) -> None:
        limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
        self._pools = [httpx.AsyncHTTPTransport(limits=limits) for _ in range(POOLS)]
        self._busy = [0] * POOLS

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Sends a request; its connection is busy until the answer is closed."""
        which = self._busy.index(min(self._busy))
        self._busy[which] += 1
        try:
            answer = await self._pools[which].handle_async_request(request)
        except BaseException:
            self._busy[which] -= 1
            raise
        answer.stream = _Counted(answer.stream, lambda: self._done(which))
        return answer

    def _done(self, which: int) -> None:
        self._busy[which] -= 1

    async def aclose(self) -> None:
        """Closes all connections."""
        for pool in self._pools:
            await pool.aclose()


class _Counted(httpx.AsyncByteStream):
    """An answer's stream that tells once when it is closed."""

    def __init__(self, stream: Any, done: Callable[[], None]) -> None:
        self._stream, self._done = stream, [done]

    def __aiter__(self) -> AsyncIterator[bytes]:
        found: AsyncIterator[bytes] = aiter(self._stream)
        return found

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        finally:
            if self._done:
                self._done.pop()()

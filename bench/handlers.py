"""The app that is sold: the same small JSON answer, at once or after a while, and a stream."""

import asyncio
import time
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

PATHS = {"": 0.0, "-1ms": 0.001, "-20ms": 0.02}
"""Endings of the path, and how long the handler waits, in seconds."""
STALL_SECONDS = 0.005
CHUNK = b"a chunk of a stream, as a model may write it\n"


async def item(request: Request) -> Response:
    """Answers after as long as the path says."""
    delay = PATHS[request.url.path.removeprefix("/item")]
    if delay:
        await asyncio.sleep(delay)
    return JSONResponse({"symbol": "BTC", "price": "97250.10", "currency": "USD"})


async def stream(request: Request) -> Response:
    """Streams as many chunks as asked for, and counts each where somebody pays for it."""
    payment = getattr(request.state, "payment", None)

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(int(request.query_params["chunks"])):
            if payment is not None:
                payment.charge(chunks=1)
            yield CHUNK

    return StreamingResponse(chunks(), media_type="text/plain")


class Stalls:
    """Measures how long the event loop let nobody in: a free path tells the worst, and forgets."""

    def __init__(self) -> None:
        self.worst = self.worst_cpu = 0.0
        self._task: asyncio.Task[None] | None = None

    async def watch(self) -> None:
        """Wakes every few milliseconds and notes how late it was."""
        while True:
            due, cpu = time.perf_counter() + STALL_SECONDS, time.thread_time()
            await asyncio.sleep(STALL_SECONDS)
            self.worst = max(self.worst, time.perf_counter() - due)
            self.worst_cpu = max(self.worst_cpu, time.thread_time() - cpu)

    async def tell(self, request: Request) -> Response:
        """The worst since the last time, in milliseconds: by the clock, and the loop's own CPU."""
        if self._task is None:
            self._task = asyncio.create_task(self.watch())
        found = {"stall_ms": 1000 * self.worst, "stall_cpu_ms": 1000 * self.worst_cpu}
        self.worst = self.worst_cpu = 0.0
        return JSONResponse(found)


def make_routes() -> list[Route]:
    """The routes of the app."""
    return [
        *(Route(f"/item{ending}", item) for ending in PATHS),
        Route("/stream", stream),
        Route("/stalls", Stalls().tell),
    ]


def bare() -> Starlette:
    """The app by itself."""
    return Starlette(routes=make_routes())

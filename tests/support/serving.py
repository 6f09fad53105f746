"""Serves an app with uvicorn on a real socket, in this process."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from starlette.types import ASGIApp

from x402mw.escrow.serve import AnnouncingServer, bind, url_of


@asynccontextmanager
async def serving(app: ASGIApp, *, port: int = 0) -> AsyncIterator[str]:
    """Serves until the block ends, and gives the URL; a failed start fails the test."""
    sock, started = bind("127.0.0.1", port), anyio.Event()
    server = AnnouncingServer(app, started.set)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.serve, [sock])
            with anyio.fail_after(20):
                await started.wait()
            yield url_of(sock)
            server.should_exit = True
    finally:
        sock.close()

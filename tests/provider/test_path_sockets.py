"""The same spellings over real sockets, through both HTTP parsers: no handler runs unpaid."""

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount

from tests.provider.test_path_spellings import SOLD, SPELT, Goods
from tests.support.provider import Desk
from x402mw.escrow.serve import bind
from x402mw.provider import FREE, PaymentMiddleware, PerCall

pytestmark = pytest.mark.anyio

METHODS = ["GET", "HEAD", "POST", "get", "OPTIONS", "QUERY", "BREW"]
CONNECTIONS = 8
EVERY = 1 if os.environ.get("X402MW_LONG") else 3
PRICES = {f"{method} {template}": PerCall("0.001") for method, template, _ in SOLD}


@asynccontextmanager
async def listening(app: Any, *, http: Any, root_path: str = "") -> AsyncIterator[int]:
    """Serves an app with uvicorn and the given parser; gives the port."""
    sock = bind("127.0.0.1", 0)
    config = uvicorn.Config(
        app, http=http, root_path=root_path, ws="none", log_level="critical", lifespan="on"
    )
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup([sock])
    assert server.started
    try:
        yield sock.getsockname()[1]
    finally:
        server.should_exit = True
        await server.shutdown([sock])


async def ask(port: int, method: str, target: str) -> int:
    """Sends one request line as it is and returns the status, 0 for no answer at all."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    line = f"{method} {target} HTTP/1.1\r\nHost: api.example.com\r\nConnection: close\r\n\r\n"
    try:
        writer.write(line.encode())
        answer = await reader.readline()
    except ConnectionError:
        return 0
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    return int(answer.split()[1]) if answer else 0


async def ask_all(port: int, prefix: str, *, every: int) -> Counter[int]:
    """Sends a share of all spellings, each with the route's method and with one other."""
    statuses = Counter[int]()
    waiting = [
        (one, prefix + target)
        for method, template, _ in SOLD
        for number, target in enumerate(SPELT[template][::every])
        for one in (method, METHODS[number % len(METHODS)])
    ]

    async def worker() -> None:
        while waiting:
            statuses[await ask(port, *waiting.pop())] += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(CONNECTIONS):
            group.create_task(worker())
    return statuses


@pytest.mark.parametrize("make", ["starlette", "fastapi"])
@pytest.mark.parametrize("shape", ["plain", "mounted", "root_path"])
@pytest.mark.parametrize("http", ["h11", "httptools"])
async def test_no_spelling_runs_a_handler_unpaid(
    tmp_path: Path, http: str, shape: str, make: str
) -> None:
    """What a real server makes of a spelling runs no handler, but runs those of an unsold app."""
    goods, bare = Goods(), Goods()
    prefix = "/shop" if shape == "mounted" else ""
    root = "/api" if shape == "root_path" else ""
    apps = getattr(goods, make)(), getattr(bare, make)()
    desk: Any = Desk(tmp_path / "journal.db")
    sold, unsold = (
        PaymentMiddleware(apps[0], provider=desk, prices=PRICES, path_prefix=root),
        apps[1],
    )
    if shape == "mounted":
        mounts = [Starlette(routes=[Mount("/shop", app)]) for app in apps]
        named = {f"{method} /shop{template}": PerCall("0.001") for method, template, _ in SOLD}
        sold = PaymentMiddleware(mounts[0], provider=desk, prices={**named, "GET /shop/free": FREE})
        unsold = mounts[1]
    async with listening(sold, http=http, root_path=root) as port:
        statuses = await ask_all(port, prefix, every=EVERY)
    async with listening(unsold, http=http, root_path=root) as port:
        await ask_all(port, prefix, every=3 * EVERY)
    assert not goods.runs
    assert statuses[402] > 100
    assert not any(status >= 500 for status in statuses), statuses
    assert len(bare.runs) == len(SOLD), bare.runs
    assert sum(bare.runs.values()) > 50

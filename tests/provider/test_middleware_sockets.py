"""The middleware behind a real server, on real sockets: streams, memory, HEAD, websockets."""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute

from tests.support.provider import Desk, Shop
from x402mw.escrow.serve import AnnouncingServer, bind
from x402mw.provider import PaymentMiddleware, PerCall, PerUnit, PriceList

pytestmark = pytest.mark.anyio

CHUNK = b"x" * 1_000_000
PRICES: PriceList = {
    "GET /stream": PerUnit("part", "0.001", max_units=100),
    "GET /events": PerUnit("event", "0.001", max_units=100),
    "GET /large": PerCall("0.001"),
    "GET /cookies": PerCall("0.001"),
}


def resident() -> int:
    """The memory of this process now, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Goods:
    """The app that is sold; `go` lets its streams end, `peak` is the most memory it saw."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.peak = 0

    async def stream(self, request: Request) -> StreamingResponse:
        kind = "text/event-stream" if request.url.path == "/events" else "text/plain"
        unit = "event" if request.url.path == "/events" else "part"

        async def parts() -> AsyncIterator[bytes]:
            for number in range(3):
                request.state.payment.charge(**{unit: 1})
                yield b"data: %d\n\n" % number
                await self.go.wait()

        return StreamingResponse(parts(), media_type=kind)

    async def large(self, request: Request) -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            for _ in range(200):
                self.peak = max(self.peak, resident())
                yield CHUNK

        length = {"content-length": str(200 * len(CHUNK))} if "known" in request.url.query else {}
        return StreamingResponse(parts(), headers=length)

    async def cookies(self, request: Request) -> Response:
        response = PlainTextResponse("goods")
        response.set_cookie("a", "1")
        response.set_cookie("b", "2")
        return response

    async def socket(self, socket: Any) -> None:
        raise AssertionError("a priced websocket was opened")

    @property
    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/stream", self.stream),
                Route("/events", self.stream),
                Route("/large", self.large),
                Route("/cookies", self.cookies),
                WebSocketRoute("/stream", self.socket),
            ]
        )


@dataclass
class Served(Shop):
    """A shop behind a socket."""

    port: int = 0

    def signed(self, path: str, method: str = "GET", **changes: Any) -> dict[str, str]:
        """The payment header for a path of this server."""
        one = self.payment(
            f"GET {path.partition('?')[0]}",
            target=path,
            method=method,
            cumulative=100_000,
            origin=f"http://127.0.0.1:{self.port}",
            **changes,
        )
        return {"PAYMENT-SIGNATURE": self.header(one)[1].decode()}

    @property
    def http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", timeout=30)


@asynccontextmanager
async def serving(goods: Goods, path: Path) -> AsyncIterator[Served]:
    """Serves the goods with uvicorn on a free port."""
    desk = Desk(path / "journal.db")
    middleware = PaymentMiddleware(goods.app, provider=desk, prices=PRICES)
    sock, started = bind("127.0.0.1", 0), asyncio.Event()
    server = AnnouncingServer(middleware, started.set)
    server.capture_signals = contextlib.nullcontext
    ready = asyncio.create_task(server.serve([sock]))
    port = sock.getsockname()[1]
    try:
        async with asyncio.timeout(10):
            await started.wait()
        assert middleware._service is not None
        yield Served(middleware, middleware, desk, middleware._service, port)
    finally:
        goods.go.set()
        server.should_exit = True
        await ready
        sock.close()
    assert middleware._service is None


@pytest.fixture
async def goods():
    return Goods()


@pytest.fixture
async def shop(goods, tmp_path):
    async with serving(goods, tmp_path) as found:
        yield found


@pytest.mark.parametrize("path", ["/stream", "/events"])
async def test_the_first_byte_comes_before_the_handler_ends(shop, goods, path):
    """A stream, server-sent events too, reaches the buyer part by part while it is made."""
    headers = shop.signed(path)
    async with shop.http as http, http.stream("GET", path, headers=headers) as answer:
        parts = answer.aiter_raw()
        first = await anext(parts)
        assert not goods.go.is_set()
        assert first == b"data: 0\n\n"
        goods.go.set()
        rest = b"".join([part async for part in parts])
    assert rest == b"data: 1\n\ndata: 2\n\n"
    assert (await shop.account()).charged == 3000


async def test_a_buyer_that_hangs_up_pays_for_what_it_got(shop, goods):
    """The connection is cut in mid-stream: what was counted is charged, nothing stays reserved."""
    headers = shop.signed("/stream")
    async with shop.http as http, http.stream("GET", "/stream", headers=headers) as answer:
        await anext(answer.aiter_raw())
    goods.go.set()
    async with asyncio.timeout(20):
        while (await shop.account()).reserved:
            pass
    assert 1000 <= (await shop.account()).charged <= 3000


@pytest.mark.parametrize("path", ["/large", "/large?known"])
async def test_a_large_answer_takes_no_memory(shop, goods, path):
    """200 MB pass through without being held, however the length is told."""
    before, size = resident(), 0
    headers = shop.signed(path)
    async with shop.http as http, http.stream("GET", path, headers=headers) as answer:
        async for part in answer.aiter_raw(65_536):
            size += len(part)
    assert size == 200 * len(CHUNK)
    assert goods.peak - before < 30_000_000


async def test_two_cookies_stay_two(shop):
    """Fields that may repeat are passed on one by one."""
    async with shop.http as http:
        answer = await http.get("/cookies", headers=shop.signed("/cookies"))
    assert answer.status_code == 200
    assert len(answer.headers.get_list("set-cookie")) == 2
    assert answer.headers["payment-response"]


async def test_head_over_a_socket(shop):
    """HEAD is 402 unpaid, and costs what GET costs paid."""
    async with shop.http as http:
        assert (await http.head("/cookies")).status_code == 402
        answer = await http.head("/cookies", headers=shop.signed("/cookies", "HEAD"))
    assert (answer.status_code, answer.content) == (200, b"")
    assert (await shop.account()).charged == 1000


async def test_a_websocket_is_refused_unpaid(shop):
    """A websocket on a priced path gets 402 instead of a connection."""
    with pytest.raises(websockets.InvalidStatus) as caught:
        async with websockets.connect(f"ws://127.0.0.1:{shop.port}/stream"):
            pass
    assert caught.value.response.status_code == 402


MISTYPED = """
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from x402mw.escrow.serve import AnnouncingServer, bind
from x402mw.provider import PaymentMiddleware, PerCall, Provider

async def quote(request):
    return PlainTextResponse("quote")

provider = Provider(escrow="http://127.0.0.1:9", api_key="pf_live_x", journal="never.db")
app = Starlette(routes=[Route("/quote/{symbol}", quote)])
app.add_middleware(
    PaymentMiddleware, provider=provider, prices={"GET /qoute/{symbol}": PerCall("0.001")}
)
"""


async def test_a_mistyped_price_stops_a_real_server(tmp_path):
    """Uvicorn with a mistyped price ends at once, non-zero, and says which line is wrong."""
    (tmp_path / "shop_app.py").write_text(MISTYPED)
    command = [sys.executable, "-m", "uvicorn", "shop_app:app", "--port", "0"]
    done = await asyncio.to_thread(
        subprocess.run, command, cwd=tmp_path, capture_output=True, text=True, timeout=30
    )
    assert done.returncode != 0
    assert "'GET /qoute/{symbol}' matches no route of the app" in done.stderr
    assert not (tmp_path / "never.db").exists()

"""The provider's app of the fault schedules: every way to be paid, and its own count of its work.

Each execution appends the name of the call to a file, in one write, before anything is answered.
The names come from the buyer, one for each logical request, so a name twice is a call that ran
twice. The app knows nothing of payments but `charge`.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from x402mw.provider import (
    FREE,
    PaymentMiddleware,
    PerCall,
    PerUnit,
    Priced,
    PriceList,
    Provider,
)

ITEMS, BIG, WORDS_MAX, ROWS_MAX = (50_000, 60_000), 30_000, 600, 100
ROW = 1000
_BIG_CHUNKS, _CHUNK = 8, b"x" * 4096
_log: list[int] = []

PRICES: PriceList = {
    "GET /": FREE,
    "GET /item/{name}": PerCall("0.05"),
    "GET /big/{name}": PerCall("0.03"),
    "GET /broken/{name}": PerCall("0.04"),
    "GET /refuse/{name}": PerCall("0.02"),
    # A price that leaves fractions: what a call costs depends on those before it.
    "POST /words/{name}": PerUnit("word", "0.0001", per=3, max_units=WORDS_MAX),
    "GET /stream/{name}": Priced(PerUnit("row", "0.001", max_units=ROWS_MAX), timeout_seconds=20),
}


DEARER: PriceList = {**PRICES, "GET /item/{name}": PerCall("0.06")}
"""What a shop may be restarted with."""


def open_log(path: Path) -> None:
    """Counts executions in this file from now on."""
    _log[:] = [os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)]


def work(name: str) -> None:
    """Executes one call: that is, notes it."""
    os.write(_log[0], f"\n{name};\n".encode())


def read_log(path: Path) -> list[str]:
    """The names of all executions. One whose line a kill cut short had not happened yet."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [line[:-1] for line in lines if line.endswith(";")]


async def item(request: Request) -> JSONResponse:
    """Sells one item by name."""
    await _take_time(request)
    name = request.path_params["name"]
    work(name)
    return JSONResponse({"item": name})


async def words(request: Request) -> JSONResponse:
    """Counts the words of a text, and charges for them."""
    used = len((await request.body()).split())
    await _take_time(request)
    work(request.path_params["name"])
    request.state.payment.charge(words=used)
    return JSONResponse({"item": request.path_params["name"], "words": used})


async def stream(request: Request) -> StreamingResponse:
    """Streams rows, each of which is charged as it goes out."""
    work(request.path_params["name"])
    pause = int(request.query_params.get("ms", "0")) / 1000

    async def rows() -> AsyncIterator[str]:
        for number in range(int(request.query_params["rows"])):
            request.state.payment.charge(rows=1)
            yield f"{number}\n"
            await asyncio.sleep(pause)

    return StreamingResponse(rows(), media_type="text/plain")


async def big(request: Request) -> StreamingResponse:
    """Sends something long whose price is known: charged before its first byte."""
    await _take_time(request)
    work(request.path_params["name"])

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(_BIG_CHUNKS):
            yield _CHUNK

    return StreamingResponse(chunks(), media_type="application/octet-stream")


async def broken(request: Request) -> PlainTextResponse:
    """Fails after the work."""
    work(request.path_params["name"])
    raise RuntimeError("broken on purpose")


async def refuse(request: Request) -> PlainTextResponse:
    """Says no after the work."""
    work(request.path_params["name"])
    return PlainTextResponse("no", status_code=404)


async def free(request: Request) -> PlainTextResponse:
    """Costs nothing."""
    return PlainTextResponse("free")


async def _take_time(request: Request) -> None:
    await asyncio.sleep(int(request.query_params.get("ms", "0")) / 1000)


def make_app(provider: Provider, *, dearer: bool) -> Starlette:
    """The shop, sold by a provider, at old or new prices."""
    app = Starlette(
        routes=[
            Route("/", free),
            Route("/item/{name}", item),
            Route("/big/{name}", big),
            Route("/broken/{name}", broken),
            Route("/refuse/{name}", refuse),
            Route("/words/{name}", words, methods=["POST"]),
            Route("/stream/{name}", stream),
        ]
    )
    app.add_middleware(PaymentMiddleware, provider=provider, prices=DEARER if dearer else PRICES)
    return app

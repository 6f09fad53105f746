"""The provider app of the whole-process tests; it counts its own executions, outside our code.

Each execution appends one line to the file named by SHOP_LOG, in one write, before it answers.
"""

import asyncio
import os
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from x402mw.provider import FREE, PaymentMiddleware, PerCall, PerUnit, PriceList, Provider

LOG = os.open(os.environ["SHOP_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def count(name: str) -> None:
    """Notes one execution."""
    os.write(LOG, f"{name}\n".encode())


async def item(request: Request) -> JSONResponse:
    """Sells one item by name; `?sleep=ms` takes its time."""
    await asyncio.sleep(int(request.query_params.get("sleep", "0")) / 1000)
    count(request.path_params["name"])
    return JSONResponse({"item": request.path_params["name"]})


async def words(request: Request) -> JSONResponse:
    """Counts the words of a text, and charges for them."""
    used = len((await request.body()).split())
    request.state.payment.charge(words=used)
    count(f"words {used}")
    return JSONResponse({"words": used})


async def stream(request: Request) -> StreamingResponse:
    """Streams numbers, each of which is charged."""
    total = int(request.path_params["total"])
    count(f"stream {total}")

    async def numbers() -> AsyncIterator[str]:
        for number in range(total):
            request.state.payment.charge(rows=1)
            yield f"{number}\n"
            await asyncio.sleep(0)

    return StreamingResponse(numbers(), media_type="text/plain")


async def broken(request: Request) -> PlainTextResponse:
    """Fails after the work."""
    count("broken")
    raise RuntimeError("broken on purpose")


async def free(request: Request) -> PlainTextResponse:
    """Costs nothing."""
    return PlainTextResponse("free")


PRICES: PriceList = {
    "GET /": FREE,
    "GET /item/{name}": PerCall("0.001"),
    "GET /other/{name}": PerCall("0.002"),
    "POST /words": PerUnit("word", "0.002", per=1000, max_units=4000),
    "GET /stream/{total:int}": PerUnit("row", "0.0001", max_units=1000),
    "GET /broken": PerCall("0.01"),
}

app = Starlette(
    routes=[
        Route("/", free),
        Route("/item/{name}", item),
        Route("/other/{name}", item),
        Route("/words", words, methods=["POST"]),
        Route("/stream/{total:int}", stream),
        Route("/broken", broken),
    ]
)
app.add_middleware(PaymentMiddleware, provider=Provider.from_env(), prices=PRICES)

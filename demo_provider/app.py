"""A provider in one file: an ordinary Starlette app, and a price list in front of it.

Run it with the settings that `x402mw register` prints:

    uvicorn demo_provider.app:app --port 8402
"""

import asyncio
import hashlib
import re
from collections import Counter
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from demo_provider.texts import STORY
from x402mw.provider import (
    FREE,
    PaymentMiddleware,
    PerCall,
    PerUnit,
    Priced,
    PriceList,
    Provider,
)


async def menu(request: Request) -> JSONResponse:
    """Lists what is sold here; free."""
    return JSONResponse({"sold": sorted(PRICES), "pay with": "x402 V2, batch-settlement"})


async def quote(request: Request) -> JSONResponse:
    """Quotes a symbol at a price that depends on nothing but its name; 0.001 a call."""
    symbol = request.path_params["symbol"].upper()
    cents = int.from_bytes(hashlib.sha256(symbol.encode()).digest()[:3], "big")
    return JSONResponse({"symbol": symbol, "price": f"{cents // 100}.{cents % 100:02d}"})


async def summarize(request: Request) -> JSONResponse:
    """Picks the most telling sentence of a text; 0.002 for 1000 tokens read, at most 4000."""
    text = (await request.body()).decode("utf-8", "replace")
    tokens = re.findall(r"\w+", text.lower())
    request.state.payment.charge(tokens=len(tokens))
    weight = Counter(token for token in tokens if len(token) > 3)
    sentences = re.split(r"(?<=[.!?])\s+", text)
    best = max(sentences, key=lambda one: sum(weight[w] for w in re.findall(r"\w+", one.lower())))
    return JSONResponse({"summary": best, "tokens": len(tokens)})


async def story(request: Request) -> StreamingResponse:
    """Tells a story word by word; 0.0001 a word, as the words go out."""

    async def tell() -> AsyncIterator[str]:
        for word in STORY.split():
            request.state.payment.charge(words=1)
            yield word + " "
            await asyncio.sleep(0.005)

    return StreamingResponse(tell(), media_type="text/plain")


async def fortune(request: Request) -> PlainTextResponse:
    """Fails after the work is done; what fails is not charged."""
    raise RuntimeError("the crystal ball is cracked")


PRICES: PriceList = {
    "GET /": FREE,
    "GET /quote/{symbol}": PerCall("0.001"),
    "POST /summarize": PerUnit("token", "0.002", per=1000, max_units=4000),
    "GET /story": Priced(PerUnit("word", "0.0001", max_units=500), timeout_seconds=30),
    "GET /fortune": PerCall("0.05"),
}

app = Starlette(
    routes=[
        Route("/", menu),
        Route("/quote/{symbol}", quote),
        Route("/summarize", summarize, methods=["POST"]),
        Route("/story", story),
        Route("/fortune", fortune),
    ]
)
app.add_middleware(PaymentMiddleware, provider=Provider.from_env(), prices=PRICES)

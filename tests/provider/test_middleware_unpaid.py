"""Unpaid requests: a priced handler never runs, however its address or method is spelled."""

import json
from itertools import product
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from tests.support.provider import HOST, Desk, Handler, Shop, call, selling
from x402mw.core.strict import b64_decode
from x402mw.provider import FREE, PaymentMiddleware, PerCall

pytestmark = pytest.mark.anyio

PRICES = {"GET /quote/{symbol}": PerCall("0.001"), "POST /buy": PerCall("0.002")}
TARGETS = [
    *("/quote/BTC", "/quote/BTC/", "//quote/BTC", "/quote//BTC", "/./quote/BTC", "/quote/./BTC"),
    *("/x/../quote/BTC", "/quote/x/../BTC", "/%2e/quote/BTC", "/x/%2e%2e/quote/BTC"),
    *("/QUOTE/BTC", "/Quote/BTC", "/quot%65/BTC", "/quot%2565/BTC", "/%71uote/BTC"),
    *("/quote%2FBTC", "/quote%252FBTC", "/quote%2fBTC", "/quote\\BTC", "/quote%5CBTC"),
    *("/quote/BTC%00", "/quote/BTC%0a", "/quote/BTC%0d%0a", "/quote/BTC%20", "/quote/%20BTC"),
    *("/quote/BTC;v=1", "/quote;v=1/BTC", "/quote/BTC?", "/quote/BTC?a=1", "/quote/BTC#top"),
    *("/quote/%C3%9F", "/quote/%ff", "/quote/BTC%e2%80%8b", "/quote/..%2fquote/BTC", "/quote/."),
    *("/quote/..", "/quote/", "/quote", "/buy", "/buy/", "//buy", "/BUY", "/buy%00", "/buy%0a"),
    *("/buy?x=/quote", "/%62uy", "/b%75y", "/buy;x", "/./buy", "/buy/.", "/x/../buy", "/buy%2f"),
    *("/api/quote/BTC", "/api//quote/BTC", "/api/../quote/BTC", "/%61pi/quote/BTC", "/api/buy"),
    *("/api/api/quote/BTC", "/api%2fquote/BTC", "/API/quote/BTC", "/api/buy/", "/api/./buy"),
    *("/api/quote/BTC/", "/api/QUOTE/BTC", "/api/quote%2fBTC", "/api;/quote/BTC", "*", ""),
    *("http://api.example.com/quote/BTC", "/http://api.example.com/quote/BTC", "/quote/BTC//"),
]
METHODS = [
    *("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PROPFIND"),
    *("get", "Get", "QUERY", "", "G\u00c9T", "GET ", "BREW"),
]
OVERRIDES = [
    (),
    ((b"x-http-method-override", b"GET"), (b"x-method-override", b"GET")),
    ((b"x-forwarded-prefix", b"/x"), (b"x-original-url", b"/free"), (b"x-rewrite-url", b"/free")),
]


class Goods:
    """The priced handlers; each counts its runs."""

    def __init__(self) -> None:
        self.runs = 0

    async def __call__(self, request: Request) -> PlainTextResponse:
        self.runs += 1
        return PlainTextResponse("goods")

    @property
    def routes(self) -> list[Route]:
        async def quote(request: Request) -> PlainTextResponse:
            return await self(request)

        return [Route("/quote/{symbol}", quote), Route("/buy", quote, methods=["POST"])]


def middleware(app: Any, path: Any, **more: Any) -> PaymentMiddleware:
    return PaymentMiddleware(app, provider=Desk(path / "j.db"), prices=PRICES, **more)


def starlette_inside(goods: Goods, path: Any) -> tuple[Any, Any]:
    options = {"provider": Desk(path / "j.db"), "prices": PRICES}
    app = Starlette(routes=goods.routes, middleware=[Middleware(PaymentMiddleware, **options)])
    app.middleware_stack = app.build_middleware_stack()
    return app, app.middleware_stack.app


def starlette_around(goods: Goods, path: Any) -> tuple[Any, Any]:
    app = middleware(Starlette(routes=goods.routes), path)
    return app, app


def fastapi_app(goods: Goods, **more: Any) -> FastAPI:
    app, router = FastAPI(**more), APIRouter()

    async def quote(symbol: str) -> str:
        goods.runs += 1
        return symbol

    async def buy() -> str:
        goods.runs += 1
        return "bought"

    router.get("/quote/{symbol}")(quote)
    router.post("/buy")(buy)
    app.include_router(router)
    return app


def fastapi_around(goods: Goods, path: Any) -> tuple[Any, Any]:
    app = middleware(fastapi_app(goods), path)
    return app, app


def mounted(goods: Goods, path: Any) -> tuple[Any, Any]:
    inner = middleware(Starlette(routes=goods.routes), path, path_prefix="/api")
    return Starlette(routes=[Mount("/api", inner)]), inner


SHAPES = [starlette_inside, starlette_around, fastapi_around, mounted]


@pytest.mark.parametrize("shape", SHAPES)
async def test_no_spelling_runs_a_priced_handler(tmp_path, shape):
    """No spelling of a path, with no method and no header, runs a priced handler unpaid."""
    goods = Goods()
    outer, inner = shape(goods, tmp_path)
    async with selling(inner, PRICES, tmp_path, outer=outer) as shop:
        for target, method, headers in product(TARGETS, METHODS, OVERRIDES):
            answer = await shop.call(method, target, headers)
            assert goods.runs == 0, (target, method, headers)
            assert answer.status >= 400 or answer.status in (307, 200), (target, method)
            assert answer.status < 500, (target, method)


@pytest.mark.parametrize("shape", [starlette_around, fastapi_around])
async def test_a_root_path_of_the_server_opens_nothing(tmp_path, shape):
    """With --root-path, as uvicorn applies it, nothing runs unpaid and prices still hold."""
    goods = Goods()
    outer, inner = shape(goods, tmp_path)
    async with selling(inner, PRICES, tmp_path, outer=outer) as shop:
        for target, method in product(TARGETS, METHODS[:8]):
            root = {"root_path": "/api", "path": "/api" + target.partition("?")[0]}
            await shop.call(method, "/api" + target, **root)
            assert goods.runs == 0, (target, method)
        priced = {"root_path": "/api", "path": "/api/quote/BTC"}
        assert (await shop.call("GET", "/api/quote/BTC", **priced)).status == 402


@pytest.mark.filterwarnings("ignore:The `root_path` parameter is deprecated")
async def test_a_root_path_of_the_app_opens_nothing(tmp_path):
    """An app that sets a root path of its own (FastAPI) is priced by the paths it routes."""
    goods = Goods()
    async with selling(fastapi_app(goods, root_path="/api"), PRICES, tmp_path) as shop:
        for target, method in product(TARGETS, METHODS[:8]):
            await shop.call(method, target)
            await shop.call(method, "/api" + target)
            assert goods.runs == 0, (target, method)
        assert (await shop.call("GET", "/api/quote/BTC")).status == 402
        assert (await shop.call("GET", "/quote/BTC")).status == 402


@pytest.fixture
async def shop(tmp_path):
    prices = {**PRICES, "GET /free": FREE}
    async with selling(Handler(), prices, tmp_path) as found:
        yield found


def handler_of(shop: Shop) -> Handler:
    found: Any = shop.middleware.app
    assert isinstance(found, Handler)
    return found


async def test_software_gets_terms(shop):
    """402 carries PAYMENT-REQUIRED, problem details and no-store, and no PAYMENT-RESPONSE."""
    answer = await shop.call("GET", "/quote/BTC")
    assert answer.problem["code"] == "payment_required"
    assert answer.header("cache-control") == "no-store"
    assert answer.paid is None
    required = json.loads(b64_decode((answer.header("payment-required") or "").encode()))
    assert required["accepts"] == answer.problem["accepts"]
    assert required["accepts"][0]["amount"] == "1000"
    assert required["accepts"][0]["extra"]["route"] == "GET /quote/{symbol}"
    assert required["resource"]["url"] == "https://api.example.com/quote/{symbol}"
    assert handler_of(shop).runs == 0


async def test_browsers_get_a_page(shop):
    """A browser gets a readable page with the same status and header."""
    answer = await shop.call("GET", "/quote/BTC", [(b"accept", b"text/html,*/*;q=0.8")])
    assert answer.status == 402
    assert answer.header("content-type") == "text/html; charset=utf-8"
    assert answer.header("payment-required")
    assert answer.header("cache-control") == "no-store"
    assert b"costs 0.001 USDC" in answer.body


async def test_head_gets_terms_without_a_body(shop):
    """HEAD is priced as GET; its 402 has no body."""
    answer = await shop.call("HEAD", "/quote/BTC")
    assert (answer.status, answer.body) == (402, b"")
    assert answer.header("payment-required")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "get"])
async def test_an_unpriced_method_of_a_priced_path_is_405(shop, method):
    """A method without a price beside a priced one never reaches the app."""
    assert (await shop.call(method, "/quote/BTC")).status == 405
    assert handler_of(shop).runs == 0


async def test_a_path_too_long_to_look_up_is_414(shop):
    """A path longer than any that is looked up is refused, whatever route it would reach."""
    assert (await shop.call("GET", "/quote/" + "x" * 9000)).status == 414
    assert (await shop.call("GET", "/" + "x" * 9000)).status == 414
    assert handler_of(shop).runs == 0


async def test_what_is_free_passes_untouched(shop):
    """Free and unpriced paths reach the app with all their extensions."""
    extensions = {"http.response.pathsend": {}, "http.response.trailers": {}}
    for target in ("/free", "/elsewhere"):
        assert (await shop.call("GET", target, extensions=extensions)).status == 200
    assert [scope["extensions"] for scope in handler_of(shop).scopes] == [extensions] * 2


@pytest.mark.parametrize("target", ["/free", "/elsewhere"])
async def test_a_payment_for_what_is_free_is_refused(shop, target):
    """A payment header on a path without a price: 409 not_priced, the handler does not run."""
    answer = await shop.call("GET", target, [shop.header(shop.payment())])
    assert (answer.status, answer.problem["code"]) == (409, "not_priced")
    assert handler_of(shop).runs == 0


HOSTS = [
    *(b"evil.example", b"api.example.com.", b"api.example.com@evil", b"", b" ", b"a" * 5000),
    *(b"api.example.com:444", b"api.example.com:", b"\xff", b"localhost.evil", b"127.0.0.1.x"),
]


@pytest.mark.parametrize("host", [*HOSTS, None])
@pytest.mark.parametrize("paid", [False, True])
async def test_an_unknown_host_is_misdirected(shop, host, paid):
    """Only a configured origin, or loopback, is served: anything else is 421."""
    headers = [shop.header(shop.payment())] if paid else []
    answer = await shop.call("GET", "/quote/BTC", headers, host=host)
    assert answer.status == 421
    assert (answer.paid is not None) is paid
    assert handler_of(shop).runs == 0


async def test_two_hosts_are_misdirected(shop):
    """Two Host fields are no host."""
    assert (await shop.call("GET", "/quote/BTC", [(b"host", HOST)])).status == 421


@pytest.mark.parametrize("host", [b"api.example.com", b"API.example.COM", b"api.example.com:443"])
async def test_a_host_only_selects_an_origin(shop, host):
    """The terms name the configured origin, whatever the spelling of Host."""
    forwarded = [(b"x-forwarded-host", b"evil.example"), (b"x-forwarded-proto", b"http")]
    forwarded.append((b"forwarded", b"host=evil.example"))
    answer = await shop.call("GET", "/quote/BTC", forwarded, host=host, scheme="http")
    required = json.loads(b64_decode((answer.header("payment-required") or "").encode()))
    assert required["resource"]["url"].startswith("https://api.example.com/")


@pytest.mark.parametrize("extensions", [None, {}, {"websocket.http.response": {}}])
@pytest.mark.parametrize("path", ["/quote/BTC", "/QUOTE/BTC", "/buy", "//buy"])
async def test_a_websocket_on_a_priced_path_is_refused(shop, path, extensions):
    """Frames cannot be paid for, so a priced path takes no websocket."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": path, "headers": [], "extensions": extensions}
    await shop.middleware(scope, None, send)
    if extensions:
        assert sent[0]["status"] == 402
    else:
        assert sent == [{"type": "websocket.close", "code": 1008, "reason": "payment required"}]


async def test_unpaid_terms_are_built_once_for_each_origin(shop):
    """A flood of odd loopback ports does not fill the memory with prebuilt answers."""
    for port in range(1, 200):
        host = b"localhost:%d" % port
        assert (await call(shop.app, "GET", "/quote/BTC", host=host)).status == 402
    (served, _) = shop.service.served.values()
    assert len(served.unpaid) <= 64

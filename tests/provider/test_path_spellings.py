"""Hundreds of spellings of priced paths: however a server reads them, no handler runs unpaid.

Raw ASGI scopes, in process. The handlers count their own runs, and the same requests to the same
app without its payment layer show how many of them would have run.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from tests.provider.spellings import decodings, spellings
from tests.support.provider import HOST, Desk, selling
from x402mw.provider import FREE, PaymentMiddleware, PerCall

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore:The `root_path` parameter is deprecated"),
]

SOLD = [
    ("GET", "/quote/{symbol}", "/quote/BTC"),
    ("POST", "/buy", "/buy"),
    ("GET", "/files/{rest:path}", "/files/a/b.txt"),
    ("GET", "/Item/{number:int}", "/Item/12"),
]
OTHER_METHODS = ["HEAD", "GET", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "QUERY"]
OTHER_METHODS += ["get", "hEAD", "post", "", "GET ", "G\u00c9T", "M-SEARCH", "PRI", "*"]
SPELLINGS_MIN = 500


@dataclass
class Goods:
    """The handlers that are sold; each counts its runs, and says which request it was."""

    runs: Counter[str] = field(default_factory=Counter)

    def sold(self, name: str) -> Callable[[Request], Any]:
        async def handler(request: Request) -> PlainTextResponse:
            self.runs[name] += 1
            return PlainTextResponse(name)

        return handler

    async def free(self, request: Request) -> PlainTextResponse:
        return PlainTextResponse("free")

    def starlette(self, **more: Any) -> Starlette:
        routes = [
            Route(template, self.sold(template), methods=[method]) for method, template, _ in SOLD
        ]
        return Starlette(routes=[*routes, Route("/", self.free), Route("/free", self.free)], **more)

    def fastapi(self, **more: Any) -> FastAPI:
        app = FastAPI(openapi_url=None, **more)
        for method, template, _ in SOLD:
            app.add_api_route(template, self.sold(template), methods=[method])
        app.add_api_route("/free", self.free)
        return app


@dataclass
class Deployed:
    """An app as it is deployed: what the server calls, its payment layer, and its root path."""

    outer: Any
    middleware: PaymentMiddleware | None
    prefix: str = ""
    root_path: str = ""
    seen: str = ""
    """`prefix` is put in front of targets, `seen` in front of decoded paths."""

    def scope(self, method: str, target: str, path: str) -> dict[str, Any]:
        """The scope of one request, as a server makes it."""
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "https",
            "path": self.seen + path,
            "raw_path": (self.seen + target.partition("?")[0]).encode(),
            "query_string": target.partition("?")[2].encode(),
            "root_path": self.root_path,
            "headers": [(b"host", HOST)],
            "state": {},
        }


Make = Callable[..., Any]
Wrap = Callable[..., Any]


def plain(make: Make, wrap: Wrap) -> Deployed:
    app = wrap(make())
    return Deployed(app, app)


def prefixed(make: Make, wrap: Wrap) -> Deployed:
    app = wrap(make(), path_prefix="/api")
    return Deployed(app, app)


def mounted(make: Make, wrap: Wrap) -> Deployed:
    inner = wrap(make(), path_prefix="/shop")
    return Deployed(Starlette(routes=[Mount("/shop", inner)]), inner, prefix="/shop")


def around_mounted(make: Make, wrap: Wrap) -> Deployed:
    app = wrap(Starlette(routes=[Mount("/shop", make())]), mount="/shop")
    return Deployed(app, app, prefix="/shop")


def root_path(make: Make, wrap: Wrap) -> Deployed:
    app = wrap(make(), path_prefix="/api")
    return Deployed(app, app, root_path="/api", seen="/api")


def stripped_root_path(make: Make, wrap: Wrap) -> Deployed:
    app = wrap(make(), path_prefix="/api")
    return Deployed(app, app, root_path="/api")


def mounted_root_path(make: Make, wrap: Wrap) -> Deployed:
    inner = wrap(make(), path_prefix="/api/shop")
    outer = Starlette(routes=[Mount("/shop", inner)])
    return Deployed(outer, inner, prefix="/shop", root_path="/api", seen="/api")


def own_root_path(make: Make, wrap: Wrap) -> Deployed:
    app = wrap(make(root_path="/api") if make.__name__ == "fastapi" else make())
    return Deployed(app, app, prefix="/api" if make.__name__ == "fastapi" else "")


SHAPES = [
    plain, prefixed, mounted, around_mounted, root_path, stripped_root_path, mounted_root_path,
    own_root_path,
]  # fmt: skip


def requests(deployed: Deployed, spelt: dict[str, list[str]]) -> Iterator[tuple[str, str, str]]:
    """(method, target, path) of every request: all readings, and other methods in turn."""
    turn = 0
    for method, template, _ in SOLD:
        for target in spelt[template]:
            for path in decodings(deployed.prefix + target):
                yield method, deployed.prefix + target, path
                turn += 1
                yield OTHER_METHODS[turn % len(OTHER_METHODS)], deployed.prefix + target, path


SPELT = {template: [path, *spellings(path)] for _, template, path in SOLD}


async def status_of(app: Any, scope: dict[str, Any]) -> int:
    """Sends one request without a body and returns the status of the answer."""
    statuses = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await app(scope, receive, send)
    (status,) = statuses
    return int(status)


@pytest.mark.parametrize("template", SPELT)
def test_there_are_enough_spellings(template: str) -> None:
    """At least 500 ways to write each path, each of them another text."""
    assert len(set(SPELT[template])) == len(SPELT[template]) > SPELLINGS_MIN


@pytest.mark.parametrize("make", ["starlette", "fastapi"])
@pytest.mark.parametrize("shape", SHAPES)
async def test_no_spelling_runs_a_handler_unpaid(tmp_path: Path, shape: Any, make: str) -> None:
    """Each spelling in each reading: the payment layer answers, or the app has no such path."""
    goods, open_goods, statuses = Goods(), Goods(), Counter[int]()

    def wrap(app: Any, *, mount: str = "", **more: Any) -> PaymentMiddleware:
        prices = {
            f"{method} {mount}{template}": PerCall("0.001") for method, template, _ in SOLD
        } | {f"GET {mount}/free": FREE}
        desk: Any = Desk(tmp_path / "journal.db")
        return PaymentMiddleware(app, provider=desk, prices=prices, **more)

    shop = shape(getattr(goods, make), wrap)
    bare = shape(getattr(open_goods, make), lambda app, **_: app)
    async with selling(shop.middleware, {}, tmp_path, outer=shop.outer):
        for request in requests(shop, SPELT):
            status = await status_of(shop.outer, shop.scope(*request))
            statuses[status] += 1
            assert not goods.runs, request
            assert status < 500, request
            await status_of(bare.outer, bare.scope(*request))
    assert statuses[402] > 1000
    assert all(count > 20 for count in open_goods.runs.values()), open_goods.runs
    assert len(open_goods.runs) == len(SOLD)

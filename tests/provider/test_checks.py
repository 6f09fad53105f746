"""Start-up checks: a price list that does not fit its app stops the start."""

from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route, Router
from starlette.staticfiles import StaticFiles

from x402mw.core.errors import ConfigurationError
from x402mw.provider import FREE, PerCall, Priced, checks
from x402mw.provider.prices import read_prices

ONE = PerCall("0.001")


async def page(request: Any) -> PlainTextResponse:
    return PlainTextResponse("page")


def get(path: str, *methods: str) -> Route:
    return Route(path, page, methods=list(methods) or None)


def check(prices: Any, *routes: Any) -> list[tuple[str, str]]:
    return checks.check_routes(read_prices(prices), list(routes))


def test_a_price_without_a_route():
    """A price that matches no route is a spelling mistake somewhere."""
    with pytest.raises(ConfigurationError, match=r"'GET /qoute/\{s\}' matches no route"):
        check({"GET /qoute/{s}": ONE}, get("/quote/{s}"))


def test_a_method_without_a_price():
    """A method of a priced path needs a price or FREE, wherever the app routes it."""
    for routes in ([get("/q", "GET", "POST")], [get("/q"), get("/q", "POST")]):
        with pytest.raises(ConfigurationError, match='"POST /q": FREE'):
            check({"GET /q": ONE}, *routes)
        assert check({"GET /q": ONE, "POST /q": FREE}, *routes)


def test_a_price_for_a_part_of_a_route():
    """A route wider than its price would serve the rest unpaid: the rest needs a word too."""
    with pytest.raises(ConfigurationError, match="only a part of the route /q/"):
        check({"GET /q/{s}": ONE}, get("/q/{rest:path}"))
    with pytest.raises(ConfigurationError, match="covers only a part"):
        check({"GET /q/BTC": ONE}, get("/q/{s}"))
    with pytest.raises(ConfigurationError, match="covers only a part"):
        check({"GET /q/{n:int}": ONE}, get("/q/{s}"))
    assert check({"GET /q/BTC": ONE, "GET /q/{s}": FREE}, get("/q/{s}"))


def test_a_route_behind_a_wider_one():
    """What the router tries first decides; a catch-all behind does not matter."""
    assert check({"GET /q/{s}": ONE}, get("/q/{s}"), get("/{rest:path}"))
    with pytest.raises(ConfigurationError, match="only a part"):
        check({"GET /q/{s}": ONE}, get("/{rest:path}"), get("/q/{s}"))


def test_the_order_is_the_routers():
    """The keys come back in the order in which the router would try them."""
    prices = {"GET /{s}": ONE, "GET /a": FREE}
    assert check(prices, get("/a"), get("/{s}")) == [("GET", "/a"), ("GET", "/{s}")]


def test_mounted_routes():
    """Routes of mounted apps and routers count with their prefix, parameters included."""
    inner = [get("/q/{s}")]
    for mount in (
        Mount("/api", routes=inner),
        Mount("/api", Router(inner)),
        Mount("/api", Starlette(routes=inner)),
    ):
        assert check({"GET /api/q/{s}": ONE}, mount) == [("GET", "/api/q/{s}")]
        with pytest.raises(ConfigurationError):
            check({"GET /q/{s}": ONE}, mount)
    assert check({"GET /{tenant}/q/{s}": ONE}, Mount("/{tenant}", routes=inner))


def test_a_mount_that_shows_no_routes(tmp_path):
    """What a mounted app does behind its prefix cannot be checked, and may be priced."""
    mount = Mount("/files", StaticFiles(directory=tmp_path))
    assert check({"GET /files/report.pdf": ONE}, mount)


def test_routers_that_fastapi_includes():
    """Routers included by FastAPI are looked into, nested ones with their prefixes."""
    app, outer, inner = FastAPI(), APIRouter(prefix="/v1"), APIRouter(prefix="/q")

    async def read(s: str) -> str:
        return s

    inner.get("/{s}")(read)
    inner.post("/{s}")(read)
    outer.include_router(inner)
    app.include_router(outer)
    routes = checks.find_routes(app)
    with pytest.raises(ConfigurationError, match="POST /v1/q/"):
        check({"GET /v1/q/{s}": ONE}, *(routes or ()))
    assert check({"GET /v1/q/{s}": ONE, "POST /v1/q/{s}": FREE}, *(routes or ()))


def test_routes_are_found_behind_other_middleware():
    """Layers that call the next one `app` are looked through; others show nothing."""
    app = Starlette(routes=[get("/q")])

    class Layer:
        def __init__(self, inner: Any) -> None:
            self.app = inner

    assert checks.find_routes(Layer(Layer(app))) is app.routes
    assert checks.find_routes(lambda scope: None) is None
    looped = Layer(None)
    looped.app = looped
    assert checks.find_routes(looped) is None


@pytest.mark.filterwarnings("ignore:The `root_path` parameter is deprecated")
def test_a_root_path_of_the_app_is_found():
    """FastAPI's own root path overrides the server's."""
    assert checks.find_root_path(FastAPI(root_path="/v1")) == "/v1"
    assert checks.find_root_path(FastAPI()) is None
    assert checks.find_root_path(Starlette()) is None


@pytest.mark.parametrize(
    ("prefix", "control"),
    [
        ("api", "/control"),
        ("/api/{x}", "/control"),
        ("https://x", "/control"),
        ("", ""),
        ("", "control"),
        ("", "//evil.example"),
        ("", "/a b"),
    ],
)
def test_paths_that_could_not_work(prefix, control):
    """The prefix and the control path are plain paths, which buyers append to an origin."""
    with pytest.raises(ConfigurationError):
        checks.check_paths(prefix, control)


def test_the_claim_window_outlasts_the_longest_call():
    """A call plus redeeming must fit before the escrow's claim window ends."""
    prices = read_prices({"GET /q": Priced(ONE, timeout_seconds=90)})
    checks.check_times(prices, claim_seconds=300, redeem_seconds=30)
    with pytest.raises(ConfigurationError, match="301 s"):
        checks.check_times(prices, claim_seconds=300, redeem_seconds=31)

"""Starting and stopping: a provider that could not work does not start; none starts half."""

import asyncio
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from tests.support.provider import Desk, Handler, call
from x402mw.core.errors import ConfigurationError
from x402mw.provider import FREE, PaymentMiddleware, PerCall
from x402mw.provider.journal import Journal

pytestmark = pytest.mark.anyio

PRICES = {"GET /quote/{symbol}": PerCall("0.001")}


class Life:
    """A server's side of the lifespan."""

    def __init__(self, app: Any) -> None:
        self.heard: asyncio.Queue[Any] = asyncio.Queue()
        self.said: list[Any] = []
        self.spoke = asyncio.Event()
        scope = {"type": "lifespan", "state": {}}
        self.task = asyncio.create_task(app(scope, self.heard.get, self.send))

    async def send(self, message: Any) -> None:
        self.said.append(message)
        self.spoke.set()

    async def go(self, kind: str) -> Any:
        """Tells the app to start or stop; returns what it says, None if it ends without a word."""
        self.spoke.clear()
        self.heard.put_nowait({"type": f"lifespan.{kind}"})
        speaking = asyncio.create_task(self.spoke.wait())
        await asyncio.wait([self.task, speaking], timeout=10, return_when=asyncio.FIRST_COMPLETED)
        speaking.cancel()
        return self.said[-1] if self.spoke.is_set() else None


async def quote(request: Any) -> PlainTextResponse:
    return PlainTextResponse("quote")


def starlette(prices: Any, desk: Any, **more: Any) -> Starlette:
    app = Starlette(routes=[Route("/quote/{symbol}", quote)], **more)
    app.add_middleware(PaymentMiddleware, provider=desk, prices=prices)
    return app


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path / "journal.db")


async def test_start_and_stop_with_the_app(desk):
    """The provider starts with the app's lifespan, before it, and stops before it says so."""
    life = Life(starlette(PRICES, desk))
    assert (await life.go("startup"))["type"] == "lifespan.startup.complete"
    assert desk.starts == 1
    assert (await life.go("shutdown"))["type"] == "lifespan.shutdown.complete"
    await life.task
    # The journal is free again: another process could take over.
    Journal.open(str(desk.path)).close()


MISTAKES = {
    "mistyped route": ({"GET /qoute/{symbol}": PerCall("0.001")}, "matches no route"),
    "mistyped price": ({"GET /quote/{symbol}": PerCall("0,001")}, "no amount"),
    "no price at all": ({"GET /quote/{symbol}": FREE}, "prices nothing"),
    "a bare text": ({"GET /quote/{symbol}": "0.001"}, "PerCall"),
}


@pytest.mark.parametrize("name", list(MISTAKES))
async def test_a_mistake_stops_the_start(desk, name):
    """A mistake in the price list fails the lifespan with a sentence; nothing is left open."""
    prices, message = MISTAKES[name]
    life = Life(starlette(prices, desk))
    said = await life.go("startup")
    assert said["type"] == "lifespan.startup.failed"
    assert message in said["message"]
    with pytest.raises(ConfigurationError):
        await life.task


async def test_any_failure_stops_the_start(desk, monkeypatch):
    """Also a failure nobody foresaw fails the start, instead of passing for "no lifespan"."""

    async def failing(*args: Any, **more: Any) -> Any:
        raise OSError("no route to host")

    monkeypatch.setattr(desk, "start", failing)
    life = Life(starlette(PRICES, desk))
    said = await life.go("startup")
    assert said["type"] == "lifespan.startup.failed"
    assert "the provider cannot start" in said["message"]
    with pytest.raises(OSError, match="no route"):
        await life.task


async def test_an_app_that_fails_to_start_stops_the_provider(desk):
    """If the app's own start fails, the journal is closed again."""

    class Lifespan:
        async def __aenter__(self) -> None:
            raise RuntimeError("no database")

        async def __aexit__(self, *_: object) -> None:
            pass

    life = Life(starlette(PRICES, desk, lifespan=lambda app: Lifespan()))
    assert (await life.go("startup"))["type"] == "lifespan.startup.failed"
    with pytest.raises(RuntimeError, match="no database"):
        await life.task
    Journal.open(str(desk.path)).close()


class Deaf:
    """An app that does not take part in the lifespan."""

    def __init__(self, *, raises: bool) -> None:
        self.raises = raises

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" and self.raises:
            raise AssertionError("http only")


@pytest.mark.parametrize("raises", [True, False])
@pytest.mark.parametrize("good", [True, False])
async def test_an_app_without_a_lifespan_is_checked_all_the_same(desk, raises, good):
    """Around an app that knows no lifespan the provider still starts, stops and may refuse."""
    prices = PRICES if good else {"GET /quote": PerCall("0,001")}
    app = PaymentMiddleware(Deaf(raises=raises), provider=desk, prices=prices)
    life = Life(app)
    said = await life.go("startup")
    if good:
        assert said["type"] == "lifespan.startup.complete"
        assert (await life.go("shutdown"))["type"] == "lifespan.shutdown.complete"
        await life.task
    else:
        assert said["type"] == "lifespan.startup.failed"
        with pytest.raises(ConfigurationError):
            await life.task
    assert app._service is None


async def test_without_a_lifespan_the_first_priced_request_starts_once(desk):
    """Mounted apps get no lifespan: the first priced requests start the provider, once."""
    handler = Handler()
    inner = PaymentMiddleware(handler, provider=desk, prices=PRICES, path_prefix="/api")
    outer = Starlette(routes=[Mount("/api", inner)])
    try:
        assert (await call(outer, "GET", "/api/free")).status == 200
        assert desk.starts == 0
        answers = await asyncio.gather(*(call(outer, "GET", "/api/quote/BTC") for _ in range(20)))
        assert {one.status for one in answers} == {402}
        assert desk.starts == 1
    finally:
        await inner._stop()


async def test_a_lazy_start_that_fails_serves_nothing(desk):
    """Without a lifespan a wrong price list fails every request, free ones too."""
    handler = Handler()
    app = PaymentMiddleware(handler, provider=desk, prices={"GET /q": PerCall("0")})
    for target in ("/q", "/free"):
        with pytest.raises(ConfigurationError):
            await call(app, "GET", target)
    assert handler.runs == 0


async def test_a_priced_route_behind_a_free_one_does_not_start(desk):
    """The self-test finds a price that another line hides, without running any handler."""
    handler = Handler()
    prices = {"GET /{any:path}": FREE, "GET /quote/{symbol}": PerCall("0.001")}
    app = PaymentMiddleware(handler, provider=desk, prices=prices)
    with pytest.raises(ConfigurationError, match="hidden behind another line"):
        await app._ready({"type": "http"})
    assert handler.runs == 0
    assert app._service is None


@pytest.mark.parametrize("more", [{"control_path": "control"}, {"path_prefix": "api"}])
async def test_paths_are_checked(desk, more):
    """A control path or a prefix that is no plain path stops the start."""
    app = PaymentMiddleware(Handler(), provider=desk, prices=PRICES, **more)
    with pytest.raises(ConfigurationError):
        await app._ready({"type": "http"})


async def test_the_self_test_asks_as_a_buyer_would(tmp_path):
    """The self-test uses a configured origin; it passes with any, and with none."""
    for number, origins in enumerate([(), ("https://a.example", "http://b.example:81")]):
        desk = Desk(tmp_path / f"{number}.db", origins=origins)
        app = PaymentMiddleware(Handler(), provider=desk, prices=PRICES)
        await app._ready({"type": "http"})
        await app._stop()

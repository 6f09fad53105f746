"""Prices beside handlers: found wherever they stand, checked like the list, and never lost."""

import asyncio
import functools
import itertools
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, Request
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint, WebSocketEndpoint
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute

from tests.support.asgi import call
from tests.support.payments import Payment
from tests.support.provider import Shop, selling
from x402mw.core.errors import ConfigurationError
from x402mw.provider import FREE, PaymentMiddleware, PerCall, PerUnit, Priced, checks, free, priced
from x402mw.provider.decorator import find_price
from x402mw.provider.prices import read_prices

pytestmark = pytest.mark.anyio

ONE = PerCall("0.001")
SEQS = itertools.count(1)


@priced("0.001")
async def page(request: Any) -> PlainTextResponse:
    return PlainTextResponse("page")


@priced("0.002")
def plain(request: Any) -> PlainTextResponse:
    return PlainTextResponse("plain")


@priced(Priced(PerUnit("word", "0.0001", max_units=50), timeout_seconds=5))
async def words(request: Any) -> PlainTextResponse:
    request.state.payment.charge(words=7)
    return PlainTextResponse("words")


@free
async def about(request: Any) -> PlainTextResponse:
    return PlainTextResponse("about")


async def bare(request: Any) -> PlainTextResponse:
    return PlainTextResponse("bare")


@priced("0.003")
class Things(HTTPEndpoint):
    def get(self, request: Any) -> PlainTextResponse:
        return PlainTextResponse("get")

    @priced("0.005")
    async def post(self, request: Any) -> PlainTextResponse:
        return PlainTextResponse("post")

    @free
    async def delete(self, request: Any) -> PlainTextResponse:
        return PlainTextResponse("delete")


def lines(*routes: Any, prices: Any = None) -> dict[str, Any]:
    """What the start makes of routes and a list of prices."""
    joined = checks.join_prices(prices or {}, list(routes))
    read = read_prices(joined)
    checks.check_routes(read, list(routes))
    return joined


async def paid(shop: Shop, method: str, target: str, template: str = "") -> tuple[int, bytes, str]:
    """Pays for one request; returns status, body and charge."""
    payment: Payment = shop.payment(
        f"{method} {template or target}", target=target, seq=next(SEQS), cumulative=100_000
    )
    answer = await shop.pay(payment)
    assert answer.paid is not None
    return answer.status, answer.body, answer.paid["amount"]


async def test_functions_classes_and_metered_handlers_are_sold(tmp_path):
    """Sync and async functions, a class and its methods: 402 first, then the price is charged."""
    app = Starlette(
        routes=[
            Route("/page/{name}", page),
            Route("/plain", plain),
            Route("/words", words, methods=["POST"]),
            Route("/about", about),
            Route("/things", Things),
        ]
    )
    async with selling(app, {}, tmp_path) as shop:
        assert (await shop.call("GET", "/page/x")).status == 402
        assert (await shop.call("HEAD", "/plain")).status == 402
        assert (await shop.call("GET", "/about")).body == b"about"
        assert (await shop.call("DELETE", "/things")).body == b"delete"
        assert (await shop.call("PUT", "/things")).status == 405
        assert await paid(shop, "GET", "/page/x", "/page/{name}") == (200, b"page", "1000")
        assert await paid(shop, "GET", "/plain") == (200, b"plain", "2000")
        assert await paid(shop, "POST", "/words") == (200, b"words", "700")
        assert await paid(shop, "GET", "/things") == (200, b"get", "3000")
        assert await paid(shop, "POST", "/things") == (200, b"post", "5000")


async def test_fastapi_path_operations_routers_and_mounts(tmp_path):
    """Path operations keep their parameters; routers, mounted apps and both orders are found."""
    app, router, inner = FastAPI(), APIRouter(), FastAPI()

    @app.get("/add/{a}")
    @priced("0.001")
    def add(a: int, b: int = 1) -> int:
        return a + b

    @priced("0.002")
    @router.get("/meter")
    async def meter(request: Request) -> str:
        return str(request.state.payment.maximum)

    @inner.get("/deep")
    @priced("0.004")
    async def deep() -> str:
        return "deep"

    app.include_router(router, prefix="/api")
    app.mount("/sub", inner)
    async with selling(app, {}, tmp_path) as shop:
        assert await paid(shop, "GET", "/add/2?b=3", "/add/{a}") == (200, b"5", "1000")
        assert await paid(shop, "GET", "/api/meter") == (200, b'"2000"', "2000")
        assert await paid(shop, "GET", "/sub/deep") == (200, b'"deep"', "4000")
        for path in ("/add/2", "/api/meter", "/sub/deep"):
            assert (await shop.call("GET", path)).status == 402


def test_the_list_and_the_marks_add_up():
    """A route is priced in the list or beside its handler; both at once stop the start."""
    joined = lines(Route("/a", page), Route("/b", bare), prices={"GET /b": ONE})
    assert joined == {"GET /a": ONE, "GET /b": ONE}
    for entry in (ONE, FREE):
        with pytest.raises(ConfigurationError, match="priced twice"):
            lines(Route("/a/{x}", page), prices={"GET /a/{x}": entry})
    with pytest.raises(ConfigurationError, match="priced twice"):
        lines(Route("/a/{x}", page), prices={"GET /a/{y}": ONE})
    with pytest.raises(ConfigurationError, match="priced twice"):
        lines(Route("/a", page), Route("/a", plain))


def test_the_mistakes_of_the_list_are_mistakes_here():
    """A method left unpriced, a route partly hidden, a price of nothing: all stop the start."""
    with pytest.raises(ConfigurationError, match='"POST /a": FREE'):
        lines(Route("/a", page), Route("/a", bare, methods=["POST"]))
    assert lines(Route("/a", page), Route("/a", about, methods=["POST"]))
    with pytest.raises(ConfigurationError, match="only a part of"):
        lines(Route("/{rest:path}", bare), Route("/a", page))
    with pytest.raises(ConfigurationError, match="prices nothing"):
        lines(Route("/a", bare))

    class Half(HTTPEndpoint):
        @priced("0.001")
        async def get(self, request: Any) -> PlainTextResponse:
            return PlainTextResponse("get")

        async def post(self, request: Any) -> PlainTextResponse:
            return PlainTextResponse("post")

    with pytest.raises(ConfigurationError, match='"POST /a": FREE'):
        lines(Route("/a", Half))


def test_marks_that_cannot_be():
    """What is no price, marked twice, no handler or a websocket is refused when it is written."""
    for wrong in (0.001, None, bare):
        with pytest.raises(ConfigurationError, match="priced like"):
            priced(wrong)  # type: ignore[arg-type] # that is the mistake
    with pytest.raises(ConfigurationError, match="priced twice"):
        free(page)
    with pytest.raises(ConfigurationError, match="priced twice"):
        priced("0.001")(priced("0.002")(lambda request: None))
    with pytest.raises(ConfigurationError, match="no handler"):
        free(7)  # type: ignore[type-var] # that is the mistake

    class Chat(WebSocketEndpoint):
        pass

    with pytest.raises(ConfigurationError, match="no HTTPEndpoint"):
        priced("0.001")(Chat)

    @free
    async def chat(websocket: Any) -> None:
        await websocket.accept()

    with pytest.raises(ConfigurationError, match="no HTTP route"):
        lines(WebSocketRoute("/chat", chat))


def wrapping(handler: Any) -> Any:
    @functools.wraps(handler)
    async def wrapper(request: Any) -> Any:
        return await handler(request)

    return wrapper


def hiding(handler: Any) -> Any:
    async def wrapper(request: Any) -> Any:
        return await handler(request)

    return wrapper


class Hider:
    """A decorator that keeps the handler where nobody can look."""

    def __init__(self, handler: Any) -> None:
        self._handler = handler

    def bound(self) -> Any:
        return self._run

    async def _run(self, request: Any) -> Any:
        return await self._handler(request)


def test_other_decorators_keep_the_price_or_stop_the_start():
    """Above or below another decorator, in a partial: found; hidden in a closure: an error."""
    assert lines(Route("/a", wrapping(page)), Route("/b", priced("0.002")(wrapping(bare))))
    assert lines(Route("/a", functools.partial(page)))
    assert lines(Mount("/m", routes=[Route("/a", wrapping(wrapping(page)))])) == {"GET /m/a": ONE}
    for hidden in (hiding(page), hiding(hiding(page)), wrapping(hiding(page))):
        with pytest.raises(ConfigurationError, match=r"hidden by another decorator"):
            lines(Route("/a", hidden))
    assert lines(Route("/a", hiding(about)), Route("/b", page)) == {"GET /b": ONE}


async def test_a_priced_handler_never_runs_unpaid(tmp_path):
    """Where the mark is out of sight, or no middleware stands in front, the handler fails."""

    @priced("0.001")
    async def secret(request: Any) -> PlainTextResponse:
        raise AssertionError("ran unpaid")

    @priced("0.001")
    def parts(request: Any) -> Any:
        yield "ran unpaid"

    @priced("0.001")
    async def stream(request: Any) -> Any:
        yield "ran unpaid"

    routes = [Route("/page", page), Route("/secret", Hider(secret).bound())]
    async with selling(Starlette(routes=routes), {}, tmp_path) as shop:
        with pytest.raises(ConfigurationError, match="outside of a paid request"):
            await shop.call("GET", "/secret")
        assert (await paid(shop, "GET", "/page"))[0] == 200
    for app in (Starlette(routes=[Route("/a", page), Route("/b", Things), Route("/c", plain)]),):
        for path in ("/a", "/b", "/c"):
            with pytest.raises(ConfigurationError, match="put PaymentMiddleware in front"):
                await call(app, "GET", path)
    with pytest.raises(ConfigurationError, match="outside"):
        next(parts(None))
    with pytest.raises(ConfigurationError, match="outside"):
        await anext(stream(None))


async def test_a_paid_call_is_one_only_within_itself(tmp_path):
    """Being paid ends with the call: neither a call beside it nor one after it is paid with it."""
    entered, leave = asyncio.Event(), asyncio.Event()

    @priced("0.001")
    async def slow(request: Any) -> PlainTextResponse:
        entered.set()
        await leave.wait()
        return PlainTextResponse("slow")

    async with selling(Starlette(routes=[Route("/slow", slow)]), {}, tmp_path) as shop:
        running = asyncio.create_task(paid(shop, "GET", "/slow"))
        await entered.wait()
        with pytest.raises(ConfigurationError):
            await slow(None)
        leave.set()
        assert (await running)[0] == 200
        with pytest.raises(ConfigurationError):
            await slow(None)


async def test_heirs_of_a_priced_class_are_sold(tmp_path):
    """A class inherits the price, and what it does instead is as guarded as what it inherits."""
    heirs = []

    class Own(HTTPEndpoint):
        def __init_subclass__(cls, **named: Any) -> None:
            heirs.append(cls)

        async def get(self, request: Any) -> PlainTextResponse:
            return PlainTextResponse("own")

    for parent in (Things, priced("0.003")(Own)):

        class Heir(parent):  # type: ignore[misc, valid-type] # any of them
            async def get(self, request: Any) -> PlainTextResponse:
                return PlainTextResponse("heir")

            async def put(self, request: Any) -> PlainTextResponse:
                return PlainTextResponse("new")

        @free
        class Gift(Heir):
            async def get(self, request: Any) -> PlainTextResponse:
                return PlainTextResponse("gift")

        app = Starlette(routes=[Route("/heir", Heir), Route("/gift", Gift)])
        for method in ("GET", "PUT"):
            with pytest.raises(ConfigurationError, match="put PaymentMiddleware in front"):
                await call(app, method, "/heir")
        assert (await call(app, "GET", "/gift")).body == b"gift"
        assert (await call(app, "PUT", "/gift")).body == b"new"
        async with selling(Starlette(routes=[Route("/heir", Heir)]), {}, tmp_path) as shop:
            assert await paid(shop, "GET", "/heir") == (200, b"heir", "3000")
    assert [heir.__name__ for heir in heirs] == ["Heir", "Gift"]


async def test_a_task_that_outlives_its_call_is_not_paid(tmp_path):
    """What a paid call leaves running copied its context, and yet sells nothing once it ended."""
    leave, found = asyncio.Event(), []

    @priced("0.001")
    async def deep() -> str:
        return "deep"

    async def behind() -> None:
        found.append(await deep())
        await leave.wait()
        with pytest.raises(ConfigurationError, match="outside of a paid request"):
            await deep()

    @priced("0.001")
    async def starting(request: Any) -> PlainTextResponse:
        tasks.append(asyncio.create_task(behind()))
        await asyncio.sleep(0)
        return PlainTextResponse("started")

    tasks: list[asyncio.Task[None]] = []
    async with selling(Starlette(routes=[Route("/start", starting)]), {}, tmp_path) as shop:
        assert (await paid(shop, "GET", "/start"))[0] == 200
        leave.set()
        await asyncio.gather(*tasks)
    assert found == ["deep"]


async def test_outer_middleware_sees_the_route_of_a_paid_request(tmp_path):
    """Tracing that stands in front learns the endpoint and its parameters, paid or not."""
    seen: list[Any] = []
    app = Starlette(routes=[Route("/page/{name}", page)])
    async with selling(app, {}, tmp_path) as shop:
        inner = shop.app

        async def tracing(scope: Any, receive: Any, send: Any) -> None:
            await inner(scope, receive, send)
            seen.append((scope.get("path_params"), scope["headers"][-1][0], scope["state"]))

        shop.app = tracing
        assert (await paid(shop, "GET", "/page/x", "/page/{name}"))[0] == 200
    assert seen == [({"name": "x"}, b"payment-signature", {})]


async def test_handlers_that_yield_give_all_their_parts(tmp_path):
    """A handler that is a generator, async or plain, gives all of its parts when paid for."""

    @priced("0.001")
    async def first() -> Any:
        yield b"one "

    @priced("0.001")
    def second() -> Any:
        yield b"two"

    async def stream(request: Any) -> StreamingResponse:
        return StreamingResponse(part async for part in both())

    async def both() -> Any:
        async for part in first():
            yield part
        for part in second():
            yield part

    app = Starlette(routes=[Route("/stream", priced("0.001")(stream))])

    async with selling(app, {}, tmp_path) as shop:
        assert await paid(shop, "GET", "/stream") == (200, b"one two", "1000")


def test_an_heir_does_not_drop_a_price_unseen():
    """A method that takes the place of a priced one without a mark stops the start; `@free` may."""

    class Sold(HTTPEndpoint):
        @priced("0.003")
        async def get(self, request: Any) -> PlainTextResponse:
            return PlainTextResponse("sold")

    class Heir(Sold):
        async def get(self, request: Any) -> PlainTextResponse:
            return PlainTextResponse("for nothing")

    class Gift(Sold):
        @free
        async def get(self, request: Any) -> PlainTextResponse:
            return PlainTextResponse("for nothing")

    for method in ("GET", "HEAD"):
        with pytest.raises(ConfigurationError, match="takes the place of a priced method"):
            find_price(Heir, method)
        assert find_price(Gift, method) is FREE


def test_a_list_is_not_needed(tmp_path):
    """`prices=` may be left out altogether."""
    middleware = PaymentMiddleware(Starlette(routes=[Route("/a", page)]), provider=None)  # type: ignore[arg-type] # not started
    assert middleware._routes({"type": "lifespan"}).find("GET", "/a")

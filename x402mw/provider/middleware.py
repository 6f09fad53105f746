"""`PaymentMiddleware`: pure ASGI, in front of any ASGI app.

    app.add_middleware(PaymentMiddleware, provider=Provider.from_env(), prices={...})

It finds the price of a request and answers 402 with terms, or hands a request with a payment to
`visit.PaidVisit`. Requests without a price pass through untouched.
"""

import asyncio
import logging
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from x402mw.core.errors import ConfigurationError
from x402mw.core.gate import Refused, name_refusal
from x402mw.core.pricing import Free
from x402mw.core.routes import Miss, RouteTable, sample_path
from x402mw.provider import answers, checks, request
from x402mw.provider.control import answer_control
from x402mw.provider.journal import JournalUnavailable
from x402mw.provider.prices import PricedRoute, PriceList, price_table, read_prices
from x402mw.provider.provider import Provider
from x402mw.provider.request import Disconnected
from x402mw.provider.service import Service
from x402mw.provider.visit import PaidVisit

log = logging.getLogger("x402mw.provider")

CONTROL_PATH = "/x402mw/control"


class PaymentMiddleware:
    """Sells an ASGI app's routes by a price list.

    `prices` maps "METHOD /path/{template}" to a plan, a `Priced` with options, or `FREE`; prices
    that stand beside their handlers (`@priced`) are added to it.
    `path_prefix` is what buyers see in front of the app's own paths (a proxy's prefix, a mount).
    Start-up checks run inside the ASGI lifespan and stop the start; where there is no lifespan, the
    first priced request runs them.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        provider: Provider,
        prices: PriceList | None = None,
        path_prefix: str = "",
        control_path: str = CONTROL_PATH,
    ) -> None:
        self.app = app
        self._provider = provider
        self._prices = prices or {}
        self._lines: Mapping[tuple[str, str], PricedRoute | Free] = {}
        self._path_prefix = path_prefix.rstrip("/")
        self._control_path = control_path
        self._root_path = checks.find_root_path(app)
        self._table: RouteTable[PricedRoute | Free] | None = None
        self._service: Service | None = None
        self._starting = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Takes one ASGI connection."""
        kind = scope["type"]
        if self._root_path is not None:
            # The app will override the server's root path: what it routes is what is priced.
            scope = {**scope, "root_path": self._root_path}
        if kind == "http":
            await self._http(scope, receive, send)
        elif kind == "lifespan":
            await self._lifespan(scope, receive, send)
        elif kind == "websocket" and self._routes(scope).covers(request.route_path(scope)):
            await _refuse_websocket(scope, send)
        else:
            await self.app(scope, receive, send)

    # Starting and stopping.

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = False

        async def receive_started() -> Message:
            nonlocal asked
            asked = True
            return await self._receive_started(scope, receive, send)

        async def send_stopped(message: Message) -> None:
            if message["type"] != "lifespan.startup.complete":
                await self._stop()
            await send(message)

        try:
            await self.app(scope, receive_started, send_stopped)
        except Exception:
            if asked:
                await self._stop()
                raise
        if not asked:
            # The app has no lifespan of its own; the provider has one all the same.
            await receive_started()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send_stopped({"type": "lifespan.shutdown.complete"})

    async def _receive_started(self, scope: Scope, receive: Receive, send: Send) -> Message:
        """Passes on what the server says; a start of the app is a start of the provider first."""
        message = await receive()
        if message["type"] == "lifespan.startup":
            try:
                await self._start(scope)
            except Exception as error:
                # A server takes a bare exception for "no lifespan here" and would go on to serve.
                await send({"type": "lifespan.startup.failed", "message": _tell(error)})
                raise
        return message

    def _routes(self, scope: Scope) -> RouteTable[PricedRoute | Free]:
        """The table of prices, checked against the app's own routes when they can be seen."""
        if self._table is None:
            routes = checks.find_routes(self.app)
            if routes is None and scope["type"] == "lifespan":
                # Elsewhere `app` may be another one, into which ours is mounted.
                routes = checks.find_routes(scope.get("app"))
            self._lines = read_prices(checks.join_prices(self._prices, routes or ()))
            order = [] if routes is None else checks.check_routes(self._lines, routes)
            checks.check_paths(self._path_prefix, self._control_path)
            self._table = price_table(self._lines, order)
        return self._table

    async def _ready(self, scope: Scope) -> Service:
        return self._service if self._service is not None else await self._start(scope)

    async def _start(self, scope: Scope) -> Service:
        async with self._starting:
            if self._service is None:
                table = self._routes(scope)
                self._service = await self._provider.start(
                    self._lines,
                    path_prefix=self._path_prefix,
                    control_path=self._control_path,
                )
                try:
                    await self._self_test(self._service, table)
                except BaseException:
                    await self._stop()
                    raise
                self._service.begin_figures()
            return self._service

    async def _stop(self) -> None:
        service, self._service = self._service, None
        if service is not None:
            await service.stop()

    async def _self_test(self, service: Service, table: RouteTable[PricedRoute | Free]) -> None:
        """Every priced route must answer an unpaid request with 402, or the app does not start."""
        for method, template in service.served:
            path = sample_path(template)
            if not isinstance(table.find(method, path), PricedRoute):
                raise ConfigurationError(f"{method} {template} is hidden behind another line")
            statuses: list[int] = []

            async def send(message: Message, statuses: list[int] = statuses) -> None:
                if message["type"] == "http.response.start":
                    statuses.append(message["status"])

            scope = {
                "type": "http",
                "method": method,
                "path": path,
                "raw_path": path.encode(),
                "query_string": b"",
                "scheme": "http",
                "headers": [(b"host", service.origins.sample_host)],
            }
            await self._http(scope, _nothing, send)
            if statuses != [402]:
                raise ConfigurationError(f"{method} {template} answers {statuses} without payment")

    # Requests.

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = request.route_path(scope), scope["method"]
        table = self._routes(scope)
        found = table.find(method, path)
        if path == self._control_path and method == "POST":
            await self._sold(None, scope, receive, send)
        elif path == self._control_path:
            allow = [(b"allow", b"POST")]
            await self._send_problem(scope, send, 405, "method", "control takes POST", found=allow)
        elif isinstance(found, PricedRoute):
            await self._sold(found, scope, receive, send)
        elif found is Miss.METHOD:
            await self._send_problem(
                scope, send, 405, "method", "this path is not sold with this method"
            )
        elif found is Miss.LENGTH:
            await self._send_problem(
                scope, send, 414, "path_too_long", "no path that is sold here is that long"
            )
        elif found is Miss.SPELLING:
            await self._send_problem(scope, send, 404, "not_found", "there is no such path")
        elif request.payment_headers(scope):
            await self._send_problem(
                scope, send, 409, "not_priced", "this path has no price: send it without payment"
            )
        else:
            await self.app(scope, receive, send)

    async def _send_problem(
        self,
        scope: Scope,
        send: Send,
        status: int,
        code: str,
        detail: str,
        *,
        found: answers.Headers | None = None,
    ) -> None:
        """Refuses what falls under no price, though something near it is sold."""
        if self._service is not None:
            self._service.events.refused(None, status, code)
        await answers.send_problem(scope, send, status, code, detail, found=found)

    async def _sold(
        self, route: PricedRoute | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answers on a priced route, or on the control path (`route` None)."""
        service = await self._ready(scope)
        served = None if route is None else service.served[route.method, route.template]
        origin = ""
        try:
            origin = service.origins.select(scope)
            if served is None:
                target = request.target(scope, self._path_prefix)
                await answer_control(service, scope, receive, send, origin=origin, target=target)
            elif request.payment_headers(scope):
                target = request.target(scope, self._path_prefix)
                visit = PaidVisit(service, served, origin, target, scope, receive, send)
                await visit.run(self.app)
            else:
                await answers.send_unpaid(scope, send, served, origin)
                service.events.challenged(served)
        except (Refused, JournalUnavailable) as error:
            if isinstance(error, Refused):
                refusal = error
            else:
                refusal = answers.unavailable()
                service.events.journal_unavailable()
            service.events.refused(served, refusal.status, refusal.reason)
            name_refusal(refusal, request.payment_headers(scope))
            await answers.send_refusal(scope, send, service.book, refusal, served, origin)
        except Disconnected:
            return


async def _refuse_websocket(scope: Scope, send: Send) -> None:
    """Refuses a websocket on a priced path: frames cannot be paid for (yet)."""
    if "websocket.http.response" in (scope.get("extensions") or {}):
        body = answers.problem(402, "websocket", "this path is not sold over websockets")
        kind = [(b"content-type", b"application/problem+json"), answers.NO_STORE]
        await send({"type": "websocket.http.response.start", "status": 402, "headers": kind})
        await send({"type": "websocket.http.response.body", "body": body})
    else:
        await send({"type": "websocket.close", "code": 1008, "reason": "payment required"})


async def _nothing() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


def _tell(error: Exception) -> str:
    """What a failed start tells its operator, who may need the kind of an unforeseen error."""
    known = isinstance(error, ConfigurationError)
    return str(error) if known else f"the provider cannot start: {error!r}"

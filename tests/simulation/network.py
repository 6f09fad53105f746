"""The wires between the parties: httpx on one end, ASGI on the other, and everything in between.

A message may be late, lost, doubled or cut off; an answer may be lost after the work was done; and
what a sender that is dead by now has sent still arrives.
"""

import asyncio
import base64
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from tests.simulation.loop import Process, SimLoop, check_alive
from tests.simulation.oracle import seq_of

READ_SECONDS = 30.0
REASON_PREFIX = "invalid_batch_settlement_escrow_"
EXPECTED = (RuntimeError, OSError)
"""What handlers raise here, and what a failing disk does."""
BROKEN: Final = object()
END: Final = object()
App = Callable[[Any, Any, Any], Any]


@dataclass
class Weather:
    """How likely each fault is for one message; `latency` is the usual delay in seconds."""

    latency: float = 0.01
    slow: float = 0.0
    lose_request: float = 0.0
    lose_answer: float = 0.0
    double: float = 0.0
    late_double: float = 0.0
    cut: float = 0.0
    garbage: float = 0.0


@dataclass
class Host:
    """One address: the processes that serve it now, each with its app."""

    name: str
    doors: list[tuple[Process, App]] = field(default_factory=list)

    def open(self, process: Process, app: App) -> None:
        """Has a process serve this address until it dies."""
        door = (process, app)
        self.doors.append(door)
        process.at_death.append(lambda: self.doors.remove(door))


class Exchange:
    """One delivery of a request to a server, and the way of its answer back."""

    def __init__(self, network: "Network", request: httpx.Request, body: bytes) -> None:
        self.network, self.request, self.body = network, request, body
        loop = network.loop
        self.head: asyncio.Future[tuple[int, Any]] = loop.create_future()
        self.parts: asyncio.Queue[Any] = asyncio.Queue()
        self.gone: asyncio.Future[None] = loop.create_future()
        self.free_at = 0.0
        self.begun = self.done = self.silent = self.mute = False
        self.cut_after: int | None = None
        self.here = ""
        self.received = False

    # The server's end.

    async def serve(self, app: App, process: Process) -> None:
        """Runs the app as a server does."""
        process.at_death.append(self._reset)
        try:
            await app(self._scope(), self._receive, self._send)
        except Exception as error:
            self.network.note("server_error", process.name, repr(error))
            if process.alive and not isinstance(error, EXPECTED):
                self.network.surprises.append(f"{process.name} answered with {error!r}")
        if not self.done:
            self._reset()

    def _scope(self) -> dict[str, Any]:
        url = self.request.url
        raw = url.raw_path.split(b"?")
        found = [(name.lower(), value) for name, value in self.request.headers.raw]
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": self.request.method,
            "scheme": url.scheme,
            "path": url.path,
            "raw_path": raw[0],
            "query_string": raw[1] if len(raw) > 1 else b"",
            "root_path": "",
            "headers": found,
            "client": ("127.0.0.1", 1),
            "server": (url.host, 443),
            "state": {"sim_seq": seq_of(self.request)[1]},
        }

    async def _receive(self) -> dict[str, Any]:
        if not self.received:
            self.received = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await asyncio.shield(self.gone)
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        check_alive()
        if self.done:
            return
        if message["type"] == "http.response.start":
            self.begun = True
            self._later(self._on_head, message["status"], list(message["headers"]))
        elif message["type"] == "http.response.body":
            more = message.get("more_body", False)
            self.done = not more
            self._later(self._on_part, message.get("body", b""), more)

    def _reset(self) -> None:
        if not self.done:
            self.done = True
            self._later(self._on_reset)

    # The wire.

    def _later(self, deliver: Callable[..., None], *args: Any) -> None:
        """Delivers in order, and whatever becomes of the sender."""
        if self.mute or self.silent:
            return
        loop = self.network.loop
        self.free_at = max(self.free_at, loop.time() + self.network.delay())
        loop.call_at(self.free_at, deliver, *args, context=self.network.context)

    # The client's end.

    def _on_head(self, status: int, found: Any) -> None:
        if not self.head.done():
            self.head.set_result((status, found))

    def _on_part(self, part: bytes, more: bool) -> None:
        if self.cut_after is not None and len(part) > self.cut_after:
            self.parts.put_nowait(part[: self.cut_after])
            self.parts.put_nowait(BROKEN)
            self.mute = True
            return
        self.parts.put_nowait(part)
        if not more:
            self.parts.put_nowait(END)

    def _on_reset(self) -> None:
        if not self.head.done():
            self.head.set_exception(httpx.ReadError("connection reset"))
            self.head.exception()
        self.parts.put_nowait(BROKEN)

    def leave(self) -> None:
        """The client hangs up."""
        if not self.gone.done():
            self.gone.set_result(None)


class Stream(httpx.AsyncByteStream):
    """The body of an answer as it comes in."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            try:
                async with asyncio.timeout(READ_SECONDS):
                    part = await self._exchange.parts.get()
            except TimeoutError:
                raise httpx.ReadTimeout("the answer stopped") from None
            if part is BROKEN:
                raise httpx.ReadError("the answer broke off")
            if part is END:
                return
            yield part

    async def aclose(self) -> None:
        """Hangs up."""
        self._exchange.leave()


class Network:
    """All wires. `rng` decides what happens to each message; `taps` see what is sent."""

    def __init__(self, loop: SimLoop, rng: random.Random, note: Callable[..., None]) -> None:
        self.loop, self.rng, self.note = loop, rng, note
        self.hosts: dict[str, Host] = {}
        self.weather = Weather()
        self.parted: set[frozenset[str]] = set()
        self.tracing = False
        self.surprises: list[str] = []
        self.taps: list[Callable[[str, httpx.Request], None]] = []
        self.context = Context()

    def host(self, name: str) -> Host:
        """The host of this name."""
        return self.hosts.setdefault(name, Host(name))

    def delay(self) -> float:
        """How long one message takes."""
        if self.rng.random() < self.weather.slow:
            return self.rng.uniform(0.1, 4.0)
        return self.rng.uniform(0.2, 1.8) * self.weather.latency

    def is_parted(self, here: str, there: str) -> bool:
        """Whether nothing passes between two names."""
        return frozenset((here, there)) in self.parted

    async def send(self, here: str, request: httpx.Request) -> httpx.Response:
        """Carries one request to its host, and the answer back."""
        check_alive()
        body = b"".join([part async for part in request.stream])  # type: ignore[union-attr]
        host = self.host(request.url.host)
        if self.is_parted(here, host.name):
            await asyncio.sleep(self.rng.choice((0.1, 3.0)))
            raise httpx.ConnectTimeout("no way through", request=request)
        if not host.doors and self.rng.random() < 0.8:
            await asyncio.sleep(self.delay())
            raise httpx.ConnectError("nobody listens", request=request)
        for tap in self.taps:
            tap(here, request)
        if self.tracing:
            self._trace(here, request, "->")
        exchange = Exchange(self, request, body)
        exchange.here = here
        if self.rng.random() < self.weather.garbage:
            await asyncio.sleep(self.delay())
            self.note("fault", "garbage")
            return self._garbage(request)
        self._post(exchange, host)
        return await self._answer(exchange, request)

    def _post(self, exchange: Exchange, host: Host) -> None:
        """Sends a request on its way, in whatever weather there is."""
        weather, chance = self.weather, self.rng.random
        if chance() < weather.lose_request:
            self.note("fault", "lost request")
            return
        self._deliver(exchange, host)
        for likely, what, latest in (
            (weather.double, "doubled request", 0.2),
            (weather.late_double, "late double", 500),
        ):
            if chance() < likely:
                self.note("fault", what)
                shadow = Exchange(self, exchange.request, exchange.body)
                shadow.silent = True
                self._deliver(shadow, host, self.rng.uniform(0, latest))
        if chance() < weather.lose_answer:
            self.note("fault", "lost answer")
            exchange.silent = True
        elif chance() < weather.cut:
            self.note("fault", "cut answer")
            exchange.cut_after = self.rng.randrange(0, 30)

    def _deliver(self, exchange: Exchange, host: Host, after: float = 0.0) -> None:
        def arrive() -> None:
            if not host.doors:
                exchange._on_reset()
                return
            process, app = self.rng.choice(host.doors)
            process.spawn(exchange.serve(app, process))

        self.loop.call_later(after + self.delay(), arrive, context=self.context)

    async def _answer(self, exchange: Exchange, request: httpx.Request) -> httpx.Response:
        timeout = request.extensions.get("timeout", {}).get("read") or READ_SECONDS
        if exchange.silent:
            # Some connections are reset at once, others just hang.
            timeout = self.rng.choice((0.05, 1.0, timeout))
        try:
            async with asyncio.timeout(timeout):
                status, found = await exchange.head
        except TimeoutError:
            exchange.leave()
            raise httpx.ReadTimeout("no answer in time", request=request) from None
        except BaseException:
            exchange.leave()
            raise
        if status >= 400:
            self._count_refusal(found)
        if self.tracing:
            self._trace(exchange.here, request, f"<- {status}")
        return httpx.Response(status, headers=found, stream=Stream(exchange), request=request)

    def _count_refusal(self, found: Any) -> None:
        """Counts the reasons of refusals, to see that each of them really came up."""
        for name, value in found:
            if name == b"payment-response":
                with suppress(ValueError):
                    reason = json.loads(base64.b64decode(value)).get("errorReason", "")
                    if reason:
                        self.note("refused", reason.removeprefix(REASON_PREFIX))

    def _trace(self, here: str, request: httpx.Request, what: str) -> None:
        session, seq = seq_of(request)
        paid = f"{session[-6:]} seq {seq}" if seq else ""
        call = request.headers.get("x-call", "")
        self.note(what, here, request.method, str(request.url), call, paid)

    def _garbage(self, request: httpx.Request) -> httpx.Response:
        """What a proxy in between may say."""
        status = self.rng.choice((502, 503, 504, 502, 200, 402, 409))
        found = [(b"content-type", b"text/html"), (b"content-length", b"4")]
        return httpx.Response(status, headers=found, content=b"oops", request=request)


class Wire(httpx.AsyncBaseTransport):
    """The network as one party sees it: the `inner` transport of everything it sends."""

    def __init__(self, network: Network, here: str) -> None:
        self._network, self._here = network, here

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Sends one request."""
        return await self._network.send(self._here, request)

"""A provider for tests: the real middleware, journal and gate; a stand-in for the escrow's side.

`selling(app, prices)` gives a `Shop`; `shop.call(...)` sends one raw ASGI request, and
`shop.payment(...)` makes a signed payment for one of its routes. Nothing here is random.
"""

import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.support import payments
from tests.support.asgi import HOST as HOST
from tests.support.asgi import Answer as Answer
from tests.support.asgi import Headers as Headers
from tests.support.asgi import Line as Line
from tests.support.asgi import answer_of as answer_of
from tests.support.asgi import call as call
from tests.support.asgi import make_scope as make_scope
from tests.support.payments import KEY_SET, NOW, TOKEN, Payment, encode
from x402mw.core import gate
from x402mw.core.amounts import Atomic
from x402mw.core.keys import public_key
from x402mw.core.sessions import Account
from x402mw.core.telemetry import Telemetry
from x402mw.core.terms import control_terms
from x402mw.provider import PaymentMiddleware, PriceList
from x402mw.provider.events import Events
from x402mw.provider.journal import Journal, Report
from x402mw.provider.offers import Seller, make_book, serve_routes
from x402mw.provider.provider import Prices
from x402mw.provider.request import Origins
from x402mw.provider.service import Quota, Service

ORIGIN = payments.ORIGIN


class Clock:
    """A clock that moves only when told to, in seconds."""

    def __init__(self) -> None:
        self.now: float = NOW

    def __call__(self) -> float:
        return self.now


class Link:
    """Stands in for the link to an escrow whose keys are `payments.KEY_SET`."""

    def __init__(self) -> None:
        self.away = False
        self.clock_off = False
        self.open_token = payments.open_token

    async def stop(self) -> None:
        """Nothing runs behind."""


class Redeemer:
    """Stands in for the redeemer: the escrow closes at once, if it `works`."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.works = True
        self.failing = False
        self.lag = 0.0
        self.nudges = 0
        self.closed: list[bytes] = []

    def nudge(self) -> None:
        """Counts the nudges."""
        self.nudges += 1

    async def redeem_session(self, session: bytes, *, final: bool) -> bool:
        """Closes the session."""
        if self.works and final:
            self.closed.append(session)
            item = await self.journal.due_session(session, final=True)
            if item is not None:
                report = Report(session, item.amount, item.amount, ended=True)
                await self.journal.apply_verdicts([report])
        return self.works

    async def stop(self) -> None:
        """Nothing runs behind."""


@dataclass
class Desk:
    """Stands in for `Provider`: starts a service on a journal of its own."""

    path: Path
    origins: Iterable[str] = (ORIGIN,)
    per_minute: int = 1000
    unredeemed_max: int = 10_000_000
    clock: Clock = field(default_factory=Clock)
    retired: dict[bytes, int] = field(default_factory=dict)
    starts: int = 0
    telemetry: Telemetry | None = None

    async def start(self, prices: Prices, *, path_prefix: str, control_path: str) -> Service:
        """Does what `Provider.start` does, without an escrow."""
        self.starts += 1
        journal = Journal.open(str(self.path), durability="process", clock=self.clock)
        seller = Seller(
            network=payments.NETWORK,
            network_id=payments.NETWORK_ID,
            pay_to=payments.PAY_TO,
            journal=journal.journal_id,
            escrow="https://escrow.example.com",
            path_prefix=path_prefix,
            control=path_prefix + control_path,
            deposit_min=KEY_SET.min_escrow,
        )
        service = Service(
            journal=journal,
            link=Link(),  # type: ignore[arg-type] # the part of it that requests use
            redeemer=Redeemer(journal),  # type: ignore[arg-type] # likewise
            origins=Origins(self.origins),
            unredeemed_max=Atomic(self.unredeemed_max),
            quota=Quota(self.per_minute),
            clock=self.clock,
            events=Events(self.telemetry),
        )
        service.served = serve_routes(seller, prices)
        service.book = make_book(
            seller, service.served, retired=self.retired, replaced=journal.replaced
        )
        return service


@dataclass
class Shop:
    """A running middleware in front of an app, and its insides."""

    app: ASGIApp
    middleware: PaymentMiddleware
    desk: Desk
    service: Service

    @property
    def journal(self) -> Journal:
        """The journal of the service."""
        return self.service.journal

    @property
    def clock(self) -> Clock:
        """The clock of everything here."""
        return self.desk.clock

    @property
    def redeemer(self) -> Redeemer:
        """The stand-in for the redeemer."""
        found: Any = self.service.redeemer
        assert isinstance(found, Redeemer)
        return found

    @property
    def link(self) -> Link:
        """The stand-in for the link."""
        found: Any = self.service.link
        assert isinstance(found, Link)
        return found

    async def call(self, method: str, target: str, headers: Headers = (), **more: Any) -> Answer:
        """Sends one raw ASGI request."""
        return await call(self.app, method, target, headers, **more)

    def payment(self, route: str = "GET /quote/{symbol}", **changes: Any) -> Payment:
        """A payment for a route; `changes` are fields of `Payment`."""
        method, _, template = route.partition(" ")
        terms = self.service.served[method, template].offer.terms
        return Payment(**{"terms": terms, "token": self.token(), "method": method, **changes})

    def control(self, content: Any, **changes: Any) -> Payment:
        """A payment for the control path, which carries `content` as JSON."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        terms = control_terms(next(iter(self.service.served.values())).offer.terms)
        target = {"terms": terms, "method": "POST", "target": terms.control, "body": body}
        return Payment(**{"token": self.token(), "cumulative": 0, **target, **changes})

    def token(self, **changes: Any) -> Any:
        """A token of the test session for this shop's journal; `changes` are its fields."""
        receipt_key = public_key(self.journal.receipt_seed)
        own = {"journal": self.journal.journal_id, "receipt_key": receipt_key}
        return replace(TOKEN, **{**own, **changes})

    def header(self, payment: Payment) -> tuple[bytes, bytes]:
        """The payment header of a payment, its terms echoed as they were offered."""
        offer = self.service.book.offers.get(payment.terms.id)
        accepted = {"accepted": offer.accepts} if offer else {}
        return b"payment-signature", encode(payment.content | accepted)

    async def pay(self, payment: Payment, headers: Headers = (), **more: Any) -> Answer:
        """Sends the request that a payment is for, with its payment."""
        more = {"body": payment.body, **more}
        return await self.call(
            payment.method, payment.target, [*headers, self.header(payment)], **more
        )

    async def account(self, session: bytes = payments.SESSION) -> Account:
        """The account of a session; an empty one if it was never used."""
        return await self.journal.account(session) or Account()

    async def state(self, seq: int) -> gate.CallState | None:
        """The state of a call of the test session."""
        found = await self.journal.lookup(payments.SESSION, seq)
        return found and found.state


@asynccontextmanager
async def selling(
    app: ASGIApp,
    prices: PriceList,
    path: Path,
    *,
    path_prefix: str = "",
    desk: Desk | None = None,
    outer: ASGIApp | None = None,
) -> AsyncIterator[Shop]:
    """Sells an app; at the end nothing may be left reserved.

    `outer` is what calls the middleware, if that is inside another app: then `app` is the
    middleware itself.
    """
    desk = desk or Desk(path / "journal.db")
    middleware = (
        app
        if isinstance(app, PaymentMiddleware)
        else PaymentMiddleware(
            app,
            provider=desk,  # type: ignore[arg-type] # it has the one method that is used
            prices=prices,
            path_prefix=path_prefix,
        )
    )
    service = await middleware._ready({"type": "http"})
    shop = Shop(outer or middleware, middleware, desk, service)
    try:
        yield shop
        assert not service.running
        assert (await shop.account()).reserved == 0
    finally:
        await middleware._stop()


class Handler:
    """A scripted ASGI app: sends the given messages, one after the other, and counts its runs."""

    def __init__(self, *script: Any) -> None:
        """`script`: messages, exceptions to raise, or async functions of (scope, receive)."""
        self.script: tuple[Any, ...] = script or (*text("done"),)
        self.runs = 0
        self.scopes: list[Scope] = []
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the script."""
        assert scope["type"] == "http"
        self.runs += 1
        self.scopes.append(scope)
        for step in self.script:
            if isinstance(step, BaseException):
                raise step
            if callable(step):
                await step(scope, receive)
            else:
                await send(step)


def start(status: int = 200, *headers: tuple[bytes, bytes], length: int | None = None) -> Message:
    """The message that begins an answer."""
    found = [*headers]
    if length is not None:
        found.append((b"content-length", str(length).encode()))
    return {"type": "http.response.start", "status": status, "headers": found}


def body(part: bytes = b"", *, more: bool = False) -> Message:
    """A part of an answer's body."""
    return {"type": "http.response.body", "body": part, "more_body": more}


def text(content: str = "done", status: int = 200) -> tuple[Message, Message]:
    """A whole short answer."""
    raw = content.encode()
    return start(status, (b"content-type", b"text/plain"), length=len(raw)), body(raw)


def count(**quantities: int) -> Any:
    """A step that meters."""

    async def step(scope: Scope, receive: Receive) -> None:
        scope["state"]["payment"].charge(**quantities)

    return step

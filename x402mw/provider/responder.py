"""One paid call, from the moment it is admitted to the moment its charge is final.

The app's answer streams through; what this file decides is *when the charge becomes durable*:

* price known, short body of known length: start and body wait until the body is complete, then
  charge and stored outcome are one transaction (a retry gets the same bytes);
* price known, otherwise: charge, then start;
* metered, length known: the start waits for the first body message, by when handlers have counted;
* metered, length unknown: the start goes at once with `final: false`; the figure is durable before
  the last body message goes out, and the buyer asks for it afterwards.

4xx, 5xx and exceptions before the first byte cost nothing; a stream cut short costs what was
delivered (`docs/protocol.md`, Charges).
"""

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from x402mw.core.amounts import ZERO
from x402mw.core.gate import Claim, Outcome
from x402mw.provider import answers, request
from x402mw.provider.answers import Figures, Headers, ServedRoute
from x402mw.provider.decorator import PAYING, Paying
from x402mw.provider.journal import Admitted, JournalUnavailable, Settled
from x402mw.provider.meter import Payment
from x402mw.provider.prices import STORED_BODY_BYTES_MAX
from x402mw.provider.service import Service

MARK_SECONDS = 1.0
_OURS = (b"payment-response", b"payment-required", b"payment-signature")
_SHARED_CACHES = (b"-cache-control", b"surrogate-control")
"""Ends of header names that tell shared caches more than Cache-Control may."""
_NO_BODY = (204, 304)

T = TypeVar("T")


@dataclass(slots=True)
class PaidCall:
    """The state of one admitted call, and the `send` that its app is given.

    `start` is the app's status line, `started` tells that it went out. While `holding`, the answer
    waits in `held`. `charged` tells that this answer is one to be paid for. Once the journal was
    `unavailable`, nothing more is served.
    """

    service: Service
    served: ServedRoute
    claim: Claim
    admitted: Admitted
    payment: Payment
    credentials: bytes
    scope: Scope
    send: Send
    start: Message | None = None
    started: bool = False
    holding: bool = False
    held: bytearray = field(default_factory=bytearray)
    charged: bool = False
    settled: Settled | None = None
    unavailable: bool = False
    next_mark: float = 0.0
    limit: asyncio.Timeout = field(default_factory=lambda: asyncio.Timeout(None))

    async def run(self, app: ASGIApp, receive: Receive) -> None:
        """Runs the handler, and leaves no way out of it without a settled charge."""
        running, key = self.service.running, (self.claim.session, self.claim.seq)
        running.add(key)
        since = self.service.events.now()
        try:
            await self._run(app, receive)
        finally:
            running.discard(key)
            self.service.events.served(self.served, since)

    async def _run(self, app: ASGIApp, receive: Receive) -> None:
        self.limit = asyncio.timeout(self.served.route.options.timeout_seconds)
        scope = request.paid_scope(self.scope, self.payment)
        paying = Paying()
        before = PAYING.set(paying)
        try:
            async with self.limit:
                await app(scope, receive, self.on_message)
        except BaseException as error:
            answered = await self._end(tell=isinstance(error, Exception))
            if not answered or not (self.limit.expired() or self.unavailable):
                raise
            cause = "timeout" if self.limit.expired() else "journal"
            self.service.events.stopped(self.served, cause)
        else:
            await self._end(tell=True)
        finally:
            paying.lasts = False
            PAYING.reset(before)
            request.show_route(self.scope, scope)

    async def on_message(self, message: Message) -> None:
        """Takes one message of the app's answer."""
        if self.unavailable or self.limit.expired():
            raise ConnectionAbortedError("this call was ended; its answer goes nowhere")
        kind = message["type"]
        if kind == "http.response.start":
            await self._on_start(message)
        elif kind == "http.response.body":
            await self._on_body(message.get("body", b""), more=message.get("more_body", False))
        # Everything else (push, early hints, trailers) would bypass the charge and is dropped.

    # The answer.

    async def _on_start(self, message: Message) -> None:
        if self.started:
            raise RuntimeError("an answer begins only once")
        self.start = message = {**message, "headers": _clean_headers(message)}
        self.held.clear()
        status = message["status"]
        self.charged = self.served.route.charges(status)
        length = 0 if status in _NO_BODY else _content_length(message)
        if length is not None and length <= STORED_BODY_BYTES_MAX:
            self.holding = True
        elif not self.charged or not self.claim.terms.metered:
            await self._durably(self._settle())
            await self._send_start()
        elif length is None:
            # From here on a crash charges the base and what was counted at the last mark.
            await self._durably(self.service.journal.start(self.admitted, self.claim.terms.base))
            self.next_mark = _now() + MARK_SECONDS
            await self._send_start()

    async def _on_body(self, body: bytes, *, more: bool) -> None:
        if self.start is None:
            raise RuntimeError("an answer begins with its status line")
        if not more:
            # The handler is done in time. What it does after its answer is its own affair.
            self.limit.reschedule(None)
        if self.holding:
            await self._hold(body, more=more)
            return
        if self.settled is None and (not more or not self.started):
            await self._durably(self._settle())
        if not self.started:
            await self._send_start()
        if self.settled is None:
            await self._mark()
        await self._send_body(body, more=more)

    async def _hold(self, body: bytes, *, more: bool) -> None:
        """Keeps a short answer back until it is whole: then charge and copy are one."""
        self.held += body
        self._check_length(more=more)
        if not more:
            self.holding = False
            whole = bytes(self.held)
            await self._durably(self._settle(self._outcome(whole)))
            await self._send_start()
            await self._send_body(whole, more=False)

    def _check_length(self, *, more: bool) -> None:
        """An answer that contradicts its own header is broken, and nobody pays for it."""
        start = self.start or {}
        said = _content_length(start) or 0
        bare = self.scope["method"] == "HEAD" or start["status"] in _NO_BODY
        if len(self.held) > said or (len(self.held) < said and not more and not bare):
            raise RuntimeError("the answer's body is not as long as its Content-Length says")

    async def _mark(self) -> None:
        if _now() >= self.next_mark:
            self.next_mark = _now() + MARK_SECONDS
            await self._durably(self.service.journal.mark(self.admitted, self.payment.used))

    # The charge.

    async def _settle(self, outcome: Outcome | None = None) -> None:
        used = self.payment.used if self.charged else None
        events = self.service.events
        since = events.now()
        self.settled = await self.service.settle(
            self.admitted, used=used, outcome=outcome, begun=self.started
        )
        events.charged(self.served, self.claim.session, self.settled.charge, since)
        self.payment.settled()

    async def _durably(self, write: Awaitable[T]) -> T:
        """Awaits a write of the journal; the call's time stands still meanwhile."""
        deadline = self.limit.when()
        if deadline is not None:
            self.limit.reschedule(None)
        try:
            return await write
        except JournalUnavailable:
            self.unavailable = True
            self.service.events.journal_unavailable()
            raise ConnectionAbortedError("the journal cannot be written") from None
        finally:
            if deadline is not None:
                self.limit.reschedule(deadline)

    def _outcome(self, body: bytes) -> Outcome | None:
        if self.start is None or not self.served.route.options.store_body:
            return None
        kept = tuple(
            (bytes(name), bytes(value))
            for name, value in self.start["headers"]
            if name.lower() != b"set-cookie"
        )
        return Outcome(self.start["status"], kept, body, self.credentials)

    # The end.

    async def _end(self, *, tell: bool) -> bool:
        """Settles what is not settled, even while this task is being cancelled.

        Answers for an app that did not begin to, if there is somebody to `tell`; returns whether it
        did.
        """
        if self.settled is None:
            settling = asyncio.ensure_future(self._settle_rest())
            self.service.keep(settling)
            await asyncio.shield(settling)
        if self.started or not tell:
            return False
        await self._send_failure()
        return True

    async def _settle_rest(self) -> None:
        # Nothing reached the buyer: void. Something did: what was counted.
        self.charged = self.charged and self.started
        try:
            await self._settle()
        except JournalUnavailable:
            self.unavailable = True

    # The wire.

    async def _send_start(self) -> None:
        if self.start is None:
            return
        self.started = True
        found = [*self.start["headers"], self._payment_response()]
        await self.send(
            {"type": "http.response.start", "status": self.start["status"], "headers": found}
        )

    async def _send_body(self, body: bytes, *, more: bool) -> None:
        await self.send({"type": "http.response.body", "body": body, "more_body": more})
        if not more:
            self.service.running.discard((self.claim.session, self.claim.seq))

    async def _send_failure(self) -> None:
        """Answers for an app that failed or ran too long before its first byte."""
        found: Headers = [self._payment_response()]
        self.started = True
        if self.unavailable:
            status, code, detail = 503, "journal", "the provider cannot use its journal now"
            found.append((b"retry-after", b"5"))
        elif self.limit.expired():
            status, code, detail = 504, "timeout", "the provider's handler took too long"
        else:
            status, code, detail = 500, "handler_failed", "the provider's handler failed"
        detail += "; nothing was charged"
        await answers.send_problem(self.scope, self.send, status, code, detail, found=found)

    def _payment_response(self) -> tuple[bytes, bytes]:
        claim, settled = self.claim, self.settled
        pending = "open" if self.started else "running"
        figures = Figures(
            commitment=claim.commitment,
            seq=claim.seq,
            payer=claim.token.payer,
            state="settled" if settled else pending,
            final=settled is not None,
            charge=settled.charge if settled else ZERO,
            charged_total=settled.charged_total if settled else None,
            open_total=settled.open_total if settled else None,
        )
        return answers.payment_response(self.service.book, figures)


def _clean_headers(message: Message) -> Headers:
    """The app's headers, without payment headers of its own and without public caching."""
    found: Headers = []
    cache: list[bytes] = []
    for name, value in message.get("headers", ()):
        lowered = name.lower()
        if lowered == b"cache-control":
            cache.append(value)
        elif lowered not in _OURS and not lowered.endswith(_SHARED_CACHES):
            found.append((name, value))
    found.append((b"cache-control", private_cache(cache)))
    return found


def private_cache(values: list[Any]) -> bytes:
    """Makes caching directives private: a paid answer is for its payer."""
    kept = [
        part.strip()
        for value in values
        for part in value.split(b",")
        if part.strip() and part.strip().lower().partition(b"=")[0] not in (b"public", b"s-maxage")
    ]
    lowered = {part.lower() for part in kept}
    if not lowered & {b"private", b"no-store"}:
        kept.append(b"private")
    return b", ".join(kept)


def _content_length(message: Message) -> int | None:
    for name, value in message.get("headers", ()):
        if name.lower() == b"content-length" and value.isdigit():
            return int(value)
    return None


def _now() -> float:
    return asyncio.get_running_loop().time()

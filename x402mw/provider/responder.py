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
import logging
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from x402mw.core.amounts import ZERO
from x402mw.core.gate import Claim, Outcome
from x402mw.provider import answers
from x402mw.provider.answers import Figures, Headers, ServedRoute
from x402mw.provider.journal import Admitted, Settled
from x402mw.provider.meter import Payment
from x402mw.provider.prices import STORED_BODY_BYTES_MAX
from x402mw.provider.service import Service

log = logging.getLogger("x402mw.provider")

MARK_SECONDS = 1.0
_OURS = (b"payment-response", b"payment-required", b"payment-signature")
_NO_BODY = (204, 304)


@dataclass(slots=True)
class PaidCall:
    """The state of one admitted call, and the `send` that its app is given."""

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
    held: list[bytes] = field(default_factory=list)
    held_bytes: int = 0
    holding: bool = False
    settled: Settled | None = None
    complete: bool = False
    charged: bool = False
    next_mark: float = 0.0

    async def run(self, app: ASGIApp, scope: Scope, receive: Receive) -> None:
        """Runs the handler, and leaves no way out of it without a settled charge."""
        try:
            async with asyncio.timeout(self.served.route.options.timeout_seconds) as limit:
                await app(scope, receive, self.on_message)
        except BaseException as error:
            await self._finish_shielded()
            late = isinstance(error, TimeoutError) and limit.expired()
            if isinstance(error, Exception) and not self.started:
                await self._send_failure(504 if late else 500)
            if not late:
                raise
            log.warning("a call to %s took too long and was ended", self.served.route.template)
            return
        if not self.complete:
            await self._finish_shielded()
        if not self.started:
            await self._send_failure(500)

    async def on_message(self, message: Message) -> None:
        """Takes one message of the app's answer."""
        kind = message["type"]
        if kind == "http.response.start":
            await self._on_start(message)
        elif kind == "http.response.body":
            await self._on_body(message)
        # Everything else (push, early hints, trailers) would bypass the charge and is dropped.

    # The answer begins.

    async def _on_start(self, message: Message) -> None:
        self.start = message
        status = message["status"]
        self.charged = self.served.route.charges(status)
        length = _content_length(message)
        known = length is not None or status in _NO_BODY
        if known and (length or 0) <= STORED_BODY_BYTES_MAX:
            self.holding = True
        elif not self.charged or not self.claim.terms.metered:
            await self._settle()
            await self._send_start()
        elif not known:
            await self._begin_stream()

    async def _begin_stream(self) -> None:
        """Marks the call as begun, so that a crash from here on charges what was counted."""
        await self.service.journal.start(self.admitted, self.claim.terms.base)
        await self._send_start()

    async def _on_body(self, message: Message) -> None:
        body, more = message.get("body", b""), message.get("more_body", False)
        if self.holding:
            self.held.append(body)
            self.held_bytes += len(body)
            if more and self.held_bytes <= STORED_BODY_BYTES_MAX:
                return
            await self._release(complete=not more)
            return
        if self.settled is None and (not more or not self.started):
            await self._settle()
        if not self.started:
            await self._send_start()
        if self.settled is None:
            await self._mark()
        self.complete = not more
        await self.send(message)

    async def _release(self, *, complete: bool) -> None:
        """Settles a held answer, with its stored outcome if the body is complete, and sends it."""
        body = b"".join(self.held)
        self.holding, self.held = False, []
        self.complete = complete
        await self._settle(self._outcome(body) if complete else None)
        await self._send_start()
        await self.send({"type": "http.response.body", "body": body, "more_body": not complete})

    async def _mark(self) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self.next_mark:
            self.next_mark = now + MARK_SECONDS
            await self.service.journal.mark(self.admitted, self.payment.used)

    # The charge.

    async def _settle(self, outcome: Outcome | None = None) -> None:
        used = self.payment.used if self.charged else None
        self.settled = await self.service.settle(
            self.admitted, used=used, outcome=outcome, begun=self.started
        )
        self.payment.settled()

    def _outcome(self, body: bytes) -> Outcome | None:
        if self.start is None or not self.served.route.options.store_body:
            return None
        kept = tuple(
            (bytes(name), bytes(value))
            for name, value in self._clean_headers(self.start)
            if name.lower() != b"set-cookie"
        )
        return Outcome(self.start["status"], kept, body, self.credentials)

    async def _finish_shielded(self) -> None:
        """Settles what is not settled, even while this task is being cancelled."""
        finishing = asyncio.ensure_future(self._finish())
        self.service.keep(finishing)
        await asyncio.shield(finishing)

    async def _finish(self) -> None:
        if self.holding and _is_whole(self.start, self.held_bytes):
            await self._release(complete=True)
        elif self.settled is None:
            # Nothing reached the buyer: void. Something did: what was counted.
            self.charged = self.charged and self.started
            await self._settle()

    # The wire.

    async def _send_start(self) -> None:
        if self.start is None:
            return
        self.started = True
        found = self._clean_headers(self.start)
        found.append(answers.payment_response(self.service.book, self._figures()))
        await self.send({**self.start, "headers": found})

    async def _send_failure(self, status: int) -> None:
        """Answers for an app that raised or ran too long before its first byte."""
        code, detail = (
            ("timeout", "the provider's handler took too long; nothing was charged")
            if status == 504
            else ("handler_failed", "the provider's handler failed; nothing was charged")
        )
        self.started = True
        found: Headers = [answers.payment_response(self.service.book, self._figures())]
        await answers.send_problem(self.scope, self.send, status, code, detail, found=found)

    def _clean_headers(self, message: Message) -> Headers:
        """The app's headers, without payment headers of its own and without public caching."""
        found = [
            (name, value)
            for name, value in message.get("headers", ())
            if name.lower() not in (*_OURS, b"cache-control")
        ]
        cache = [
            value for name, value in message.get("headers", ()) if name.lower() == b"cache-control"
        ]
        found.append((b"cache-control", private_cache(cache)))
        return found

    def _figures(self) -> Figures:
        claim, settled = self.claim, self.settled
        return Figures(
            commitment=claim.commitment,
            seq=claim.seq,
            payer=claim.token.payer,
            state="settled" if settled else "open",
            final=settled is not None,
            charge=settled.charge if settled else ZERO,
            charged_total=settled.charged_total if settled else None,
            open_total=settled.open_total if settled else None,
        )


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


def _is_whole(start: Message | None, held_bytes: int) -> bool:
    if start is None:
        return False
    length = _content_length(start)
    return start["status"] in _NO_BODY or length == held_bytes

"""A provider in memory for tests of the buyer: honest, unless it is told to misbehave.

The provider judges with the real `core.gate`. `script` holds what it does to the next requests
instead of the honest thing: each entry takes the request and returns an answer or raises.
"""

import hashlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from tests.support import payments as p
from x402mw.core import gate, headers, tokens
from x402mw.core.amounts import ZERO, Atomic
from x402mw.core.gate import Book, Call, CallState, Offer, Outcome, Refused, Standing
from x402mw.core.messages import PaymentPayload, SettlementExtra, SettlementResponse
from x402mw.core.sessions import Account, SessionState, settle
from x402mw.core.strict import b64_encode, b64url_encode, dumps
from x402mw.core.terms import Terms, control_terms, write_requirements
from x402mw.core.tokens import Receipt, SessionToken
from x402mw.core.vouchers import parse_voucher

ESCROW = "http://127.0.0.1:8401"
ORIGIN = "http://127.0.0.1:8402"
PREFIX = "invalid_batch_settlement_escrow_"
Answer = Callable[[httpx.Request], httpx.Response]


class CutBody(httpx.AsyncByteStream, httpx.SyncByteStream):
    """A body that breaks off."""

    def __init__(self, beginning: bytes) -> None:
        self.beginning = beginning
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        yield self.beginning
        raise httpx.RemoteProtocolError("cut off")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self:
            yield chunk

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


@dataclass
class Clock:
    """Moves only when told to."""

    now: float = float(p.NOW)

    def __call__(self) -> float:
        return self.now


def route(method: str, template: str, amount: int, **more: Any) -> Terms:
    """Terms of one route of the scripted provider."""
    return replace(p.QUOTE, method=method, route=template, amount=Atomic(amount), **more)


@dataclass
class ScriptedProvider:
    """Serves priced routes honestly, unless `script` says otherwise. `ran` counts handlers."""

    clock: Clock
    routes: list[Terms] = field(
        default_factory=lambda: [
            route("GET", "/item/{name}", 1000),
            route("GET", "/other/{name}", 2000),
            route("POST", "/echo", 1000),
            route("POST", "/upload", 1000, binding=1),
            replace(p.METERED, route="/words"),
        ]
    )
    escrow: str = ESCROW
    script: list[Answer] = field(default_factory=list)
    control_script: list[Answer] = field(default_factory=list)
    requests: list[httpx.Request] = field(default_factory=list)
    unpaid: int = 0
    ran: int = 0
    charge: int | None = None
    status: int = 200
    unfinished: bool = False
    journal: bytes = p.JOURNAL
    replaced: frozenset[bytes] = frozenset()
    settle_at_escrow: Callable[[bytes, int], None] = lambda session, charged: None
    accounts: dict[bytes, Account] = field(default_factory=dict)
    best: dict[bytes, bytes] = field(default_factory=dict)
    rows: dict[tuple[bytes, int], Call] = field(default_factory=dict)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        """Answers one request: control, script, or honestly."""
        request.read()
        self.requests.append(request)
        if request.url.path == p.QUOTE.control:
            if self.control_script:
                return self.control_script.pop(0)(request)
            return self.control(request)
        if self.script and "PAYMENT-SIGNATURE" in request.headers:
            return self.script.pop(0)(request)
        return self.honest(request)

    def offers(self) -> list[Offer]:
        """What is sold now."""
        return [
            Offer(
                replace(terms, journal=self.journal),
                write_requirements(
                    replace(terms, journal=self.journal),
                    escrow=self.escrow,
                    suggested_deposit=ZERO,
                ),
            )
            for terms in self.routes
        ]

    def book(self) -> Book:
        """What the gate judges by."""
        offers = self.offers()
        return Book(
            network=p.NETWORK,
            network_id=p.NETWORK_ID,
            pay_to=p.PAY_TO,
            journal=self.journal,
            asset="USDC",
            offers={offer.terms.id: offer for offer in offers},
            control=control_terms(offers[0].terms),
            replaced=self.replaced,
        )

    def offer(self, request: httpx.Request) -> Offer | None:
        """The offer for a request's route."""
        method = "GET" if request.method == "HEAD" else request.method
        first = request.url.path.split("/")[1]
        for offer in self.offers():
            if offer.terms.method == method and offer.terms.route.split("/")[1] == first:
                return offer
        return None

    def honest(self, request: httpx.Request) -> httpx.Response:
        """Does what a provider should."""
        offer = self.offer(request)
        if offer is None:
            return httpx.Response(200, text="free")
        if "PAYMENT-SIGNATURE" not in request.headers:
            self.unpaid += 1
            return self.required([offer.accepts])
        try:
            return self._serve(request, offer)
        except Refused as refusal:
            return self.refuse(refusal, offer)

    def required(self, accepts: list[dict[str, Any]], **more: str) -> httpx.Response:
        """A 402 with terms."""
        content = {"x402Version": 2, "accepts": accepts}
        found = {"PAYMENT-REQUIRED": b64_encode(dumps(content)), **more}
        return httpx.Response(402, headers=found, json={})

    def _claim(self, request: httpx.Request, *, control: bool = False) -> gate.Claim:
        def open_token(text: str) -> SessionToken:
            return tokens.open_session_token(text, p.KEY_SET)

        values = [request.headers["PAYMENT-SIGNATURE"].encode()]
        claim = gate.inspect(values, self.book(), open_token, control=control)
        gate.bind(
            claim,
            method=request.method,
            origin=f"{request.url.scheme}://{request.url.netloc.decode()}",
            target=request.url.raw_path.decode().removesuffix("?"),
            body_hash=hashlib.sha256(request.content).digest(),
        )
        return claim

    def _serve(self, request: httpx.Request, offer: Offer) -> httpx.Response:
        claim = self._claim(request)
        key = (claim.session, claim.seq)
        decided = gate.decide(
            claim,
            offer=offer,
            book=self.book(),
            standing=Standing(),
            call=self.rows.get(key),
            account=self.accounts.get(claim.session),
            best=self.best.get(claim.session),
            credentials=b"",
            now=self.clock(),
        )
        if isinstance(decided, Outcome):
            return self.settled(self.rows[key], decided.body)
        self.ran += 1
        amount = claim.terms.amount
        charge = amount if self.charge is None else Atomic(self.charge)
        if self.status >= 400:
            charge = ZERO
        self.accounts[claim.session] = settle(decided, reserved=amount, charge=charge)
        raw = claim.signed.raw + claim.signed.signature
        old = self.best.get(claim.session, bytes(176))
        self.best[claim.session] = max(old, raw, key=lambda signed: signed[72:80])
        body = b"" if request.method == "HEAD" else f"ran {self.ran}".encode()
        outcome = Outcome(self.status, (), body, b"")
        call = Call(*key, claim.commitment, amount, CallState.SETTLED, charge, outcome)
        self.rows[key] = call
        return self.settled(call, body)

    def settled(self, call: Call, body: bytes, status: int | None = None) -> httpx.Response:
        """The answer of a settled call; with `unfinished` its figure is kept back."""
        state = "open" if self.unfinished else "settled"
        word = self.word(call, state, final=not self.unfinished)
        return httpx.Response(
            status or (call.outcome.status if call.outcome else 200),
            headers={"PAYMENT-RESPONSE": word},
            content=body,
        )

    def word(self, call: Call, state: str, *, reason: str = "", **changes: Any) -> str:
        """A `PAYMENT-RESPONSE` about a call, true but for `changes`."""
        account = self.accounts.get(call.session, Account())
        extra = {
            "seq": str(call.seq),
            "state": state,
            "charged_total": str(account.charged),
            "open_total": str(account.reserved),
            "final": True,
        }
        charge = changes.pop("charge", call.charge)
        return headers.encode_header(
            SettlementResponse(
                success=state != "refused",
                transaction=changes.pop("commitment", call.commitment).hex(),
                network=p.NETWORK,
                amount=str(charge),
                error_reason=PREFIX + reason if reason else None,
                extra=SettlementExtra.model_validate(extra | changes),
            )
        )

    def refuse(self, refusal: Refused, offer: Offer | None) -> httpx.Response:
        """Answers a refusal as the real provider does."""
        found = {}
        if refusal.call is not None:
            state = "settled" if refusal.call.state is CallState.SETTLED else "running"
            found["PAYMENT-RESPONSE"] = self.word(refusal.call, state, reason=refusal.reason)
        elif refusal.seq is not None:
            call = Call(b"", refusal.seq, refusal.commitment or b"", ZERO)
            changes: dict[str, Any] = {"final": refusal.final}
            if refusal.account is not None:
                changes["charged_total"] = str(refusal.account.charged)
                changes["open_total"] = str(refusal.account.reserved)
                if refusal.best:
                    changes["voucher"] = b64url_encode(refusal.best)
            word = self.word(call, "refused", reason=refusal.reason, **changes)
            found["PAYMENT-RESPONSE"] = word
        if refusal.retry_after:
            found["Retry-After"] = str(refusal.retry_after)
        if refusal.status == 402 and offer is not None:
            return self.required([offer.accepts], **found)
        return httpx.Response(refusal.status, headers=found, json={"code": refusal.reason})

    def control(self, request: httpx.Request) -> httpx.Response:
        """Answers `close` and `receipt`."""
        claim = self._claim(request, control=True)
        wanted = json.loads(request.content)
        account = self.accounts.get(claim.session, Account())
        if wanted["op"] == "close":
            account = replace(account, state=SessionState.CLOSED)
            self.accounts[claim.session] = account
            self.settle_at_escrow(claim.session, account.charged)
        content: dict[str, Any] = {
            "charged": str(account.charged),
            "open": str(account.reserved),
            "receipt": self.receipt(claim.session, account, final=wanted["op"] == "close"),
        }
        if "seq" in wanted:
            call = self.rows.get((claim.session, int(wanted["seq"])))
            content["seq"] = {
                "state": "settled" if call else "refused",
                "charge": str(call.charge) if call else "0",
                "final": call is not None,
            }
        return httpx.Response(200, json=content)

    def receipt(self, session: bytes, account: Account, *, final: bool, seed: bytes = b"") -> str:
        """A receipt for a session, signed with the provider's receipt key."""
        receipt = Receipt(
            p.NETWORK, session, p.PAY_TO, self.journal, account.charged, account.reserved, 1, final
        )
        return tokens.sign_receipt(receipt, seed or p.RECEIPTS)

    # What may go wrong.

    def lose_answer(self, request: httpx.Request) -> httpx.Response:
        """The request arrives and is served; its answer does not come back."""
        self.honest(request)
        raise httpx.ReadError("lost")

    def cut_answer(self, request: httpx.Request) -> httpx.Response:
        """The request is served; its answer breaks off in the body."""
        whole = self.honest(request)
        found = [(name, value) for name, value in whole.headers.raw]
        return httpx.Response(whole.status_code, headers=found, stream=CutBody(whole.content[:1]))

    def lose_request(self, request: httpx.Request) -> httpx.Response:
        """The request never arrives, but nobody can tell."""
        raise httpx.ReadTimeout("lost")

    def answer(self, status: int, *, serve: bool = False, **found: str) -> Answer:
        """A proxy's answer, without any word of the provider."""

        def give(request: httpx.Request) -> httpx.Response:
            if serve:
                self.honest(request)
            fields = {name.replace("_", "-"): value for name, value in found.items()}
            return httpx.Response(status, headers=fields, text="proxy")

        return give

    def refusal(self, status: int, reason: str, **more: Any) -> Answer:
        """A refusal for a reason that needs no cause."""

        def give(request: httpx.Request) -> httpx.Response:
            refused = Refused(status, reason, reason, **more)
            call = self.asked(request)
            refused.seq, refused.commitment = call.seq, call.commitment
            refused.account = self.accounts.get(call.session)
            refused.best = self.best.get(call.session)
            return self.refuse(refused, self.offer(request))

        return give

    def says(self, status: int, state: str, *, reason: str = "", **changes: Any) -> Answer:
        """Any word about the call that was asked for."""

        def give(request: httpx.Request) -> httpx.Response:
            word = self.word(self.asked(request), state, reason=reason, **changes)
            found = {"PAYMENT-RESPONSE": word, "Retry-After": "0"}
            return httpx.Response(status, headers=found, text="said")

        return give

    def asked(self, request: httpx.Request) -> Call:
        """The call that a request asks for, as its voucher says."""
        signed = sent_voucher(request)
        commitment = hashlib.sha256(signed.raw).digest()
        return Call(signed.voucher.session, signed.voucher.seq, commitment, Atomic(1000))


def sent_payment(request: httpx.Request) -> PaymentPayload:
    """The payment header of a request."""
    value = request.headers["PAYMENT-SIGNATURE"].encode()
    return headers.decode_header(PaymentPayload, value, headers.SIGNATURE_BYTES_MAX)


def sent_voucher(request: httpx.Request) -> Any:
    """The voucher of a request."""
    return parse_voucher(sent_payment(request).payload.voucher)

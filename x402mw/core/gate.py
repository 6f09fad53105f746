"""The provider's judgement of one paid request, in the order of `docs/protocol.md`, Checks.

    inspect   2 one header  3 decoded  4 constants  5 ranges  6 token  7 voucher signature
    bind      8 the request hash
    decide    9 seq known?  10 times and state  11 terms  12 cover

1. Cheap checks come before dear ones. Until the signature has verified, a refusal tells nothing but
   a code and the caller's own seq.
2. `decide` runs inside the journal's write transaction, step 9 first: a late identical retry finds
   its outcome whatever has changed since, and is never answered 402.
3. Pure: the clock, the rows and the token cache are arguments. A refusal is raised as `Refused`.
"""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from x402mw.core import headers, sessions
from x402mw.core.book import Book as Book
from x402mw.core.book import Offer as Offer
from x402mw.core.book import Standing as Standing
from x402mw.core.calls import Call as Call
from x402mw.core.calls import CallState as CallState
from x402mw.core.calls import Outcome as Outcome
from x402mw.core.errors import Malformed, RemoteError, TokenRefused, UnknownKey
from x402mw.core.messages import EscrowExtra, PaymentPayload, PaymentRequirements, validate
from x402mw.core.sessions import Account, NotCovered, SessionState
from x402mw.core.strict import same
from x402mw.core.terms import SCHEME, Terms, read_terms
from x402mw.core.tokens import SessionToken
from x402mw.core.vouchers import (
    BIND_BODY,
    BIND_TERMS,
    NO_BODY_HASH,
    BoundRequest,
    SignedVoucher,
    hash_request,
    parse_voucher,
    verify_voucher,
)

VOUCHER_LATE_MS = 120_000
VOUCHER_EARLY_MS = 420_000
TERMS_GRACE_SECONDS = 300
RETRY_SECONDS = 1
ESCROW_RETRY_SECONDS = 5


@dataclass(frozen=True, slots=True)
class Claim:
    """A payment whose token and voucher have verified; what it is for is not yet checked."""

    signed: SignedVoucher
    commitment: bytes
    token: SessionToken
    terms: Terms
    binding: int
    expires: int

    @property
    def session(self) -> bytes:
        """The raw id of the session that pays."""
        return self.signed.voucher.session

    @property
    def seq(self) -> int:
        """The identity of the logical request."""
        return self.signed.voucher.seq


class Refused(RemoteError):
    """A payment that is not accepted as it is. Nothing was changed.

    `status` is HTTP's, `reason` the machine code; `final` tells that these very bytes can never be
    admitted. `seq` is known once the header decoded, `call` and `account` once the signature
    verified, and `best` then is the newest voucher of the session, for a buyer that lost its own.
    """

    code = "refused"

    def __init__(
        self, status: int, reason: str, detail: str, *, final: bool = False, retry_after: int = 0
    ) -> None:
        """`retry_after` is in seconds; 0 leaves the header out."""
        super().__init__(detail)
        self.status = status
        self.reason = reason
        self.detail = detail
        self.final = final
        self.retry_after = retry_after
        self.seq: int | None = None
        self.commitment: bytes | None = None
        self.call: Call | None = None
        self.account: Account | None = None
        self.best: bytes | None = None
        self.more: dict[str, Any] = {}


# Steps 2 to 7.


def inspect(
    values: Sequence[bytes],
    book: Book,
    open_token: Callable[[str], SessionToken],
    *,
    control: bool = False,
) -> Claim:
    """Judges the payment headers by themselves (steps 2 to 7), or raises `Refused`."""
    payment, signed = _decode(values)
    try:
        return _inspect(payment, signed, book, open_token, control=control)
    except Refused as refusal:
        _name(refusal, signed)
        raise


def name_refusal(refusal: Refused, values: Sequence[bytes]) -> None:
    """Notes in a refusal whose payment it is about, if the payment headers say so at all."""
    if refusal.seq is None:
        with contextlib.suppress(Refused):
            _name(refusal, _decode(values)[1])


def _name(refusal: Refused, signed: SignedVoucher) -> None:
    refusal.seq = signed.voucher.seq
    refusal.commitment = hashlib.sha256(signed.raw).digest()


def _decode(values: Sequence[bytes]) -> tuple[PaymentPayload, SignedVoucher]:
    if len(values) != 1:
        raise Refused(400, "payment_header", "send exactly one payment header", final=True)
    try:
        payment = headers.decode_header(PaymentPayload, values[0], headers.SIGNATURE_BYTES_MAX)
        return payment, parse_voucher(payment.payload.voucher)
    except Malformed as error:
        raise Refused(400, "malformed", str(error), final=True) from None


def _inspect(
    payment: PaymentPayload,
    signed: SignedVoucher,
    book: Book,
    open_token: Callable[[str], SessionToken],
    *,
    control: bool,
) -> Claim:
    terms = _accepted_terms(payment.accepted, book)
    _check_ranges(payment, terms, control=control)
    token = _check_token(payment.payload.token, signed, terms, book, open_token)
    if control and terms.id != book.control.id:
        raise Refused(400, "control_terms", "control takes the control terms only", final=True)
    if not verify_voucher(signed, token.session_key):
        raise Refused(402, "signature", "the voucher's signature does not verify", final=True)
    return Claim(
        signed=signed,
        commitment=hashlib.sha256(signed.raw).digest(),
        token=token,
        terms=terms,
        binding=payment.payload.binding,
        expires=payment.payload.expires,
    )


def _accepted_terms(accepted: dict[str, Any], book: Book) -> Terms:
    """Reads what the buyer accepted; an echo of a current offer needs no second look."""
    offer = _echoed_offer(accepted, book)
    if offer is not None:
        return offer.terms
    try:
        requirements = validate(PaymentRequirements, accepted)
        constants = (SCHEME, book.network, book.asset, book.pay_to)
        found = (requirements.scheme, requirements.network, requirements.asset, requirements.pay_to)
        if found != constants:
            raise Refused(402, "constants", "this payment is for somebody else", final=True)
        extra = validate(EscrowExtra, requirements.extra)
        return read_terms(requirements, extra, book.network_id)
    except Malformed as error:
        raise Refused(400, "malformed", f"accepted: {error}", final=True) from None


def _echoed_offer(accepted: dict[str, Any], book: Book) -> Offer | None:
    extra = accepted.get("extra")
    name = extra.get("terms") if isinstance(extra, dict) else None
    try:
        offer = book.offers.get(bytes.fromhex(name)) if isinstance(name, str) else None
    except ValueError:
        return None
    return offer if offer is not None and same(offer.accepts, accepted) else None


def _check_ranges(payment: PaymentPayload, terms: Terms, *, control: bool) -> None:
    if terms.amount == 0 and not control:
        raise Refused(400, "amount", "a payment of nothing buys nothing", final=True)
    binding = payment.payload.binding
    if binding >= BIND_TERMS:
        raise Refused(400, "binding", "this binding of the request is not supported", final=True)
    if binding > terms.binding:
        raise Refused(400, "binding", "this route binds more of the request", final=True)


def _check_token(
    text: str,
    signed: SignedVoucher,
    terms: Terms,
    book: Book,
    open_token: Callable[[str], SessionToken],
) -> SessionToken:
    try:
        token = open_token(text)
    except UnknownKey as error:
        raise _later("unknown_key", str(error)) from None
    except TokenRefused as error:
        raise Refused(402, "token", str(error)) from None
    voucher = signed.voucher
    found = (voucher.network, voucher.session, token.pay_to, token.asset)
    if found != (book.network_id, token.session, book.pay_to, book.asset):
        raise Refused(402, "constants", "this voucher or token is for somebody else", final=True)
    if token.journal in book.replaced:
        raise Refused(409, "journal_replaced", "the provider's book was replaced: open a session")
    if token.journal != book.journal or terms.journal != book.journal:
        raise Refused(402, "constants", "this session is for another journal", final=True)
    return token


# Step 8.


def bind(claim: Claim, *, method: str, origin: str, target: str, body_hash: bytes) -> None:
    """Checks that the voucher was signed for this very request, or raises `Refused` (step 8)."""
    bound = BoundRequest(
        binding=claim.binding,
        method=method,
        origin=origin,
        target=target,
        body_hash=body_hash if claim.binding == BIND_BODY else NO_BODY_HASH,
        amount=claim.terms.amount,
        expires=claim.expires,
        terms_id=claim.terms.id,
    )
    if hash_request(bound) == claim.signed.voucher.request_hash:
        return
    refusal = refused(claim, 400, "request_binding", "the voucher is for another request")
    refusal.final = True
    refusal.more = {
        "saw": {
            "method": method,
            "origin": origin,
            "target": target,
            "bodySha256": bound.body_hash.hex(),
            "amount": str(bound.amount),
            "expires": bound.expires,
            "terms": bound.terms_id.hex(),
            "binding": bound.binding,
        }
    }
    raise refusal


# Steps 9 to 12.


def decide(
    claim: Claim,
    *,
    offer: Offer,
    book: Book,
    standing: Standing,
    call: Call | None,
    account: Account | None,
    best: bytes | None,
    credentials: bytes,
    now: float,
) -> Account | Outcome:
    """Judges a bound claim against the journal's rows (steps 9 to 12).

    Returns the account with the call reserved, or the stored outcome of an identical retry; else
    raises `Refused`. `call`, `account` and `best` (the newest signed voucher) are the rows of this
    seq and session, if there are any; `now` is in seconds.
    """
    try:
        if call is not None:
            return recall(call, claim, credentials)
        account = account or Account(deposit=claim.token.deposit)
        _check_times(claim, account, standing, now)
        _check_terms(claim, offer, book, now)
        return _reserve(claim, account, standing)
    except Refused as refusal:
        refusal.seq, refusal.commitment = claim.seq, claim.commitment
        refusal.call, refusal.account, refusal.best = call, account, best
        raise


def recall(call: Call, claim: Claim, credentials: bytes) -> Outcome:
    """Answers a seq that is already used: the stored outcome, or `Refused` with 409 or 410."""
    if call.commitment != claim.commitment:
        raise Refused(409, "seq_used", "another voucher was admitted for this request")
    if call.state is not CallState.SETTLED:
        raise Refused(409, "running", "this request is running", retry_after=RETRY_SECONDS)
    if call.outcome is None:
        raise Refused(410, "outcome_gone", "this request was settled; its answer is not kept")
    if call.outcome.credentials != credentials:
        raise Refused(409, "credentials", "the stored answer belongs to other credentials")
    return call.outcome


def _check_times(claim: Claim, account: Account, standing: Standing, now: float) -> None:
    if account.state is not SessionState.OPEN:
        raise Refused(402, "session_closing", "the session takes no new calls", final=True)
    if standing.throttled:
        raise Refused(429, "quota", "too many calls that cost nothing", retry_after=60)
    if standing.clock_off:
        raise _later("clock", "the provider's clock is off")
    if now >= claim.token.exp:
        if standing.escrow_away:
            raise _later("escrow_away", "the escrow is away")
        raise Refused(402, "token_expired", "renew the session token")
    if claim.token.retired:
        raise Refused(402, "token_retired", "renew the session token: its key was retired")
    late = int(now * 1000) - claim.expires
    if late >= VOUCHER_LATE_MS or -late >= VOUCHER_EARLY_MS:
        detail = "the voucher has expired" if late > 0 else "the voucher expires too far ahead"
        refusal = Refused(402, "voucher_expires", detail, final=late > 0)
        refusal.more = {"serverTime": int(now)}
        raise refusal


def _check_terms(claim: Claim, offer: Offer, book: Book, now: float) -> None:
    terms = claim.terms
    same_route = _what_is_sold(terms) == _what_is_sold(offer.terms)
    retired_at = book.retired.get(terms.id)
    in_grace = retired_at is not None and now - retired_at < TERMS_GRACE_SECONDS
    if not same_route or not (terms.id == offer.terms.id or in_grace):
        raise Refused(402, "terms", "these terms are not offered here (any more)")


def _what_is_sold(terms: Terms) -> tuple[str, str, str]:
    # The unit belongs to it: a handler that counts words cannot serve terms in tokens.
    return terms.method, terms.route, terms.unit


def _reserve(claim: Claim, account: Account, standing: Standing) -> Account:
    amount = claim.terms.amount
    if standing.escrow_away and standing.unredeemed + amount > standing.unredeemed_max:
        raise _later("max_unredeemed", "the escrow is away and too much is unredeemed")
    try:
        return sessions.admit(
            account,
            cumulative=claim.signed.voucher.cumulative,
            amount=amount,
            deposit=claim.token.deposit,
        )
    except NotCovered as error:
        raise Refused(402, "cover", str(error)) from None


def _later(reason: str, detail: str) -> Refused:
    """Refuses for now, for a cause on the escrow's side: the same bytes may pass later."""
    return Refused(503, reason, detail, retry_after=ESCROW_RETRY_SECONDS)


def refused(claim: Claim, status: int, reason: str, detail: str) -> Refused:
    """Makes a refusal of a claim whose signature has verified."""
    refusal = Refused(status, reason, detail)
    refusal.seq, refusal.commitment = claim.seq, claim.commitment
    return refusal

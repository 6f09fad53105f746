"""A small world of keys, terms and signed payments for tests of the core; nothing is random."""

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

from x402mw.core import gate, headers, keys, messages, tokens, vouchers
from x402mw.core.amounts import Atomic
from x402mw.core.strict import b64_encode, dumps
from x402mw.core.terms import Terms, control_terms, write_requirements

NOW = 1_800_000_000
NETWORK = "escrow:test"
ORIGIN = "https://api.example.com"
PAY_TO = "ag_" + "0a" * 16
PAYER = "ag_" + "0b" * 16
JOURNAL = bytes.fromhex("0c" * 16)
SESSION = bytes.fromhex("0d" * 16)
EMPTY_HASH = hashlib.sha256(b"").digest()


def seed(name: str) -> bytes:
    """A key seed that is the same in every run."""
    return hashlib.sha256(f"x402mw test seed {name}".encode()).digest()


ROOT, SIGNER, BUYER, RECEIPTS = (seed(name) for name in ("root", "signer", "buyer", "receipts"))
ROOT_KEY, SIGNER_KEY, BUYER_KEY, RECEIPT_KEY = map(keys.public_key, (ROOT, SIGNER, BUYER, RECEIPTS))
NETWORK_ID = vouchers.network_id(NETWORK, ROOT_KEY)
KEY_SET = tokens.KeySet(
    network=NETWORK,
    serial=1,
    not_after=NOW + 86_400,
    keys={tokens.key_id(SIGNER_KEY): SIGNER_KEY},
    retired=frozenset(),
    min_escrow=Atomic(10_000),
    claim_seconds=300,
)
TOKEN = tokens.SessionToken(
    network=NETWORK,
    session=SESSION,
    pay_to=PAY_TO,
    journal=JOURNAL,
    session_key=BUYER_KEY,
    receipt_key=RECEIPT_KEY,
    payer=PAYER,
    asset="USDC",
    deposit=Atomic(1_000_000),
    released=Atomic(0),
    exp=NOW + 600,
    claim_until=NOW + 900,
)
QUOTE = Terms(
    network=NETWORK,
    network_id=NETWORK_ID,
    pay_to=PAY_TO,
    journal=JOURNAL,
    asset="USDC",
    amount=Atomic(1000),
    timeout_seconds=60,
    binding=vouchers.BIND_BODY,
    unit="",
    unit_price=0,
    per=0,
    base=Atomic(0),
    method="GET",
    route="/quote/{symbol}",
    control="/.x402/control",
)
UPLOAD = replace(QUOTE, method="POST", route="/upload", binding=vouchers.BIND_REQUEST)
METERED = replace(
    QUOTE,
    method="POST",
    route="/summarize",
    amount=Atomic(8100),
    unit="token",
    unit_price=2000,
    per=1000,
    base=Atomic(100),
)
CONTROL = control_terms(QUOTE)


def offer_of(offered: Terms) -> gate.Offer:
    """The offer that states these terms."""
    deposit = Atomic(100_000)
    accepts = write_requirements(
        offered, escrow="https://escrow.example.com", suggested_deposit=deposit
    )
    return gate.Offer(offered, accepts)


OFFERS = {offered.id: offer_of(offered) for offered in (QUOTE, UPLOAD, METERED)}
BOOK = gate.Book(
    network=NETWORK,
    network_id=NETWORK_ID,
    pay_to=PAY_TO,
    journal=JOURNAL,
    asset="USDC",
    offers=OFFERS,
    control=CONTROL,
)


def open_token(text: str) -> tokens.SessionToken:
    """What a provider does with a token, without a cache."""
    return tokens.open_session_token(text, KEY_SET)


@dataclass(frozen=True)
class Payment:
    """One signed request; `replace` any field of it to make a variant."""

    terms: Terms = QUOTE
    token: tokens.SessionToken = TOKEN
    network_id: bytes = NETWORK_ID
    session: bytes = SESSION
    seq: int = 7
    cumulative: int = 1000
    binding: int = 0
    method: str = "GET"
    origin: str = ORIGIN
    target: str = "/quote/BTC"
    body: bytes = b""
    expires: int = (NOW + 300) * 1000
    key: bytes = BUYER
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def body_hash(self) -> bytes:
        """SHA-256 of the body, or zeros when the signature leaves the body out."""
        return hashlib.sha256(self.body).digest() if self.binding == 0 else vouchers.NO_BODY_HASH

    @property
    def bound(self) -> vouchers.BoundRequest:
        """What is signed for."""
        return vouchers.BoundRequest(
            binding=self.binding,
            method=self.method,
            origin=self.origin,
            target=self.target,
            body_hash=self.body_hash,
            amount=self.terms.amount,
            expires=self.expires,
            terms_id=self.terms.id,
        )

    @property
    def signed(self) -> vouchers.SignedVoucher:
        """The signed voucher."""
        voucher = vouchers.Voucher(
            self.network_id,
            self.session,
            self.seq,
            Atomic(self.cumulative),
            vouchers.hash_request(self.bound),
        )
        return vouchers.sign_voucher(voucher, keys.secret_key(self.key))

    @property
    def content(self) -> dict[str, Any]:
        """The JSON inside the header; `changes` overrides keys of the inner payload."""
        inner = {
            "voucher": self.signed.wire,
            "token": tokens.sign_session_token(self.token, SIGNER),
            "expires": self.expires,
            "binding": self.binding,
        }
        return {
            "x402Version": 2,
            "payload": inner | self.changes,
            "accepted": offer_of(self.terms).accepts,
        }

    @property
    def header(self) -> bytes:
        """The value of `PAYMENT-SIGNATURE`."""
        return encode(self.content)


def encode(content: Any) -> bytes:
    """JSON as a payment header carries it."""
    return b64_encode(dumps(content)).encode()


def inspect(payment: Payment, book: gate.Book = BOOK, *, control: bool = False) -> gate.Claim:
    """Steps 2 to 7 for a payment."""
    return gate.inspect([payment.header], book, open_token, control=control)


def bind(claim: gate.Claim, payment: Payment) -> None:
    """Step 8, for the request that the payment describes."""
    gate.bind(
        claim,
        method=payment.method,
        origin=payment.origin,
        target=payment.target,
        body_hash=hashlib.sha256(payment.body).digest(),
    )


def header_size(content: dict[str, Any]) -> int:
    """How long a header with this content is."""
    return len(headers.encode_header(messages.validate(messages.PaymentPayload, content)))

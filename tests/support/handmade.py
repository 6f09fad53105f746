"""A buyer that signs by hand, over real sockets: for what no honest wallet would ever send."""

import base64
import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from tests.support.escrow import Agent, MovingClock, RunningEscrow
from x402mw.core import headers, ids, keys, vouchers
from x402mw.core.amounts import Atomic, atomic
from x402mw.core.messages import EscrowExtra, PaymentRequirements, validate
from x402mw.core.terms import Terms, control_terms, read_terms, write_requirements
from x402mw_client.escrow import AsyncEscrowClient

SEED = hashlib.sha256(b"x402mw handmade session key").digest()
_seqs = itertools.count(1)


@dataclass(frozen=True)
class Handmade:
    """One request and its payment, both free to be changed: `replace(...)` makes a variant.

    `sign_*` is what the voucher says where that differs from what is sent.
    """

    shop: str
    accepts: Mapping[str, Any]
    network_id: bytes
    session: bytes
    token: str
    expires: int
    method: str = "GET"
    path: str = "/item"
    body: bytes = b""
    seq: int = field(default_factory=lambda: next(_seqs))
    cumulative: int = 1_000_000
    seed: bytes = SEED

    @property
    def terms(self) -> Terms:
        """The terms that the buyer accepts."""
        requirements = validate(PaymentRequirements, self.accepts)
        extra = validate(EscrowExtra, requirements.extra)
        return read_terms(requirements, extra, self.network_id)

    @property
    def signed(self) -> bytes:
        """The 176 bytes of the signed voucher."""
        bound = vouchers.BoundRequest(
            binding=0,
            method=self.method,
            origin=self.shop,
            target=self.path,
            body_hash=hashlib.sha256(self.body).digest(),
            amount=self.terms.amount,
            expires=self.expires,
            terms_id=self.terms.id,
        )
        voucher = vouchers.Voucher(
            self.network_id,
            self.session,
            self.seq,
            Atomic(self.cumulative),
            vouchers.hash_request(bound),
        )
        signed = vouchers.sign_voucher(voucher, keys.secret_key(self.seed))
        return signed.raw + signed.signature

    def header(self, signed: bytes | None = None, **changes: Any) -> str:
        """The payment header, around these 176 bytes or the right ones."""
        inner = {
            "voucher": base64.urlsafe_b64encode(signed or self.signed).rstrip(b"=").decode(),
            "token": self.token,
            "expires": self.expires,
            "binding": 0,
        }
        content = {"x402Version": 2, "payload": inner | changes, "accepted": dict(self.accepts)}
        return base64.b64encode(json.dumps(content).encode()).decode()

    async def send(
        self,
        http: httpx.AsyncClient,
        *,
        header: str | None = None,
        method: str | None = None,
        path: str | None = None,
        body: bytes | None = None,
        shop: str | None = None,
    ) -> httpx.Response:
        """Sends it as it is, or with the payment moved to another request."""
        return await http.request(
            method or self.method,
            (shop or self.shop) + (path or self.path),
            content=self.body if body is None else body,
            headers={headers.PAYMENT_SIGNATURE: header or self.header()},
        )

    def control(self, **wish: Any) -> "Handmade":
        """A control request of this session."""
        terms = control_terms(self.terms)
        accepts = write_requirements(terms, escrow="-", suggested_deposit=atomic(0))
        return replace(
            self,
            method="POST",
            path=terms.control,
            accepts=accepts,
            body=json.dumps(wish).encode(),
            seq=next(_seqs),
        )


async def offer_of(http: httpx.AsyncClient, method: str, url: str) -> dict[str, Any]:
    """The first offer of a 402."""
    answer = await http.request(method, url)
    assert answer.status_code == 402, answer.text
    content = json.loads(base64.b64decode(answer.headers[headers.PAYMENT_REQUIRED]))
    return dict(content["accepts"][0])


async def open_handmade(
    http: httpx.AsyncClient, escrow: RunningEscrow, buyer: Agent, shop: str, clock: MovingClock
) -> Handmade:
    """Opens a session of $2 for a shop's `/item`, and prepares the first payment."""
    accepts = await offer_of(http, "GET", f"{shop}/item")
    client = AsyncEscrowClient(escrow.url, buyer.api_key)
    try:
        keyset = await client.keys()
        record = await client.open_session(
            accepts["payTo"],
            atomic(2_000_000),
            session_key=keys.public_key(SEED),
            journal=ids.parse_id(ids.JOURNAL, accepts["extra"]["journal"]),
        )
    finally:
        await client.aclose()
    assert record.token is not None
    return Handmade(
        shop=shop,
        accepts=accepts,
        network_id=vouchers.network_id(keyset.network, keyset.root_key),
        session=record.session,
        token=record.token,
        expires=int(clock() + 300) * 1000,
    )

"""Edge keys and edge signatures: provider and escrow always agree, and accept none of them.

The vectors are data of two public projects, named in their files. Where these stand over messages
of their own, `curve` makes the same kinds over real vouchers.
"""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.escrow.market import SESSION_SEED, Market, market
from tests.support import payments
from tests.vectors import curve
from x402mw.core import gate, ids, keys
from x402mw.core.errors import KeyRefused, TokenRefused
from x402mw.core.strict import b64url_encode
from x402mw.core.terms import control_terms
from x402mw.core.tokens import KeySet, SessionToken, open_session_token, sign_session_token
from x402mw.core.vouchers import SignedVoucher, verify_voucher
from x402mw.escrow.settings import NETWORK

pytestmark = pytest.mark.anyio

HERE = Path(__file__).parent
ACCEPTED = 117


def read(name: str) -> list[dict[str, Any]]:
    """The vectors of a file, their hex decoded."""
    rows = json.loads((HERE / f"ed25519_{name}.json").read_text())["vectors"]
    wanted = ("key", "message", "signature")
    return [row | {part: bytes.fromhex(row[part]) for part in wanted} for row in rows]


WYCHEPROOF, SPECCHECK = read("wycheproof"), read("speccheck")
SMALL = [curve.encode(point) for point in curve.TORSION]
MIXED = [curve.Signer(SESSION_SEED, twist=point).public for point in curve.TORSION[1:]]
EDGE_KEYS = {*SMALL, *MIXED, *curve.other_spellings(), *(row["key"] for row in SPECCHECK)}
EDGE_KEYS |= {row["key"] for row in WYCHEPROOF if row["result"] == "acceptable"}
EDGE_KEYS -= {row["key"] for row in SPECCHECK if row["key"].hex().startswith("442aad9f")}
"""That last one is a proper key, and its edge signatures have a large S."""


def usable(key: bytes) -> bool:
    """Whether the key passes our check."""
    try:
        return keys.check_public_key(key) == key
    except KeyRefused:
        return False


def test_vectors_of_wycheproof() -> None:
    """Every valid vector is accepted; what is invalid, or "acceptable" to some, is refused."""
    verdicts = {"valid": 0, "invalid": 0, "acceptable": 0}
    for row in WYCHEPROOF:
        found = usable(row["key"]) and keys.verify(row["key"], row["message"], row["signature"])
        assert found == (row["result"] == "valid"), row
        verdicts[row["result"]] += 1
    assert verdicts == {"valid": ACCEPTED, "invalid": 64, "acceptable": 29}


@pytest.mark.parametrize("number", range(len(SPECCHECK)))
def test_vectors_of_speccheck(number: int) -> None:
    """Small, mixed and misspelt points, and a large S: all refused."""
    row = SPECCHECK[number]
    assert not (usable(row["key"]) and keys.verify(row["key"], row["message"], row["signature"]))


def test_pairs_of_small_and_misspelt_points() -> None:
    """Key and R of small order in any spelling, with S of 0: no message is ever signed by them."""
    spellings = [*SMALL, *curve.other_spellings()]
    assert len(set(spellings)) == len(spellings) > 40
    for key in spellings:
        assert not usable(key)
        for r in SMALL + spellings[-6:]:
            assert not keys.verify(key, b"voucher", r + bytes(32))


def test_the_open_arithmetic_is_that_of_the_library() -> None:
    """The control: what `curve` makes without a twist is an ordinary signature."""
    signer = curve.Signer(SESSION_SEED)
    assert signer.public == keys.public_key(SESSION_SEED)
    plain = signer.finish(curve.encode(curve.multiply(5, curve.BASE)), 5, b"voucher")
    assert keys.verify(signer.public, b"voucher", plain)
    for twisted in MIXED:
        assert not usable(twisted)


@dataclass
class Bench:
    """One session at a real escrow, and the gate of its provider."""

    market: Market
    session: bytes
    token: str
    key_set: KeySet

    @property
    def payment(self) -> payments.Payment:
        """A payment in this session; its network, journal and payee are the escrow's."""
        m = self.market
        terms = replace(
            payments.QUOTE,
            network=NETWORK,
            network_id=m.network,
            pay_to=m.provider.agent_id,
            journal=ids.parse_id(ids.JOURNAL, m.journal),
        )
        return payments.Payment(
            terms=terms,
            network_id=m.network,
            session=self.session,
            key=SESSION_SEED,
        )

    def inspect(self, signed: SignedVoucher) -> str:
        """What the provider's gate says to a voucher: "ok" or its reason."""
        payment = self.payment
        terms = payment.terms
        book = replace(
            payments.BOOK,
            network=NETWORK,
            network_id=terms.network_id,
            pay_to=terms.pay_to,
            journal=terms.journal,
            offers={terms.id: payments.offer_of(terms)},
            control=control_terms(terms),
        )
        content = payment.content
        content["payload"] |= {"voucher": signed.wire, "token": self.token}
        try:
            gate.inspect([payments.encode(content)], book, self._open_token)
        except gate.Refused as refusal:
            return refusal.reason
        return "ok"

    def _open_token(self, text: str) -> SessionToken:
        return open_session_token(text, self.key_set)

    async def redeem(self, vouchers: list[SignedVoucher]) -> list[str]:
        """What the escrow says to each of them: "ok" or its code."""
        items = [{"voucher": signed.wire, "amount": "0.001"} for signed in vouchers]
        return [item.get("code", "ok") for item in await self.market.redeem(*items)]


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with market(tmp_path) as m:
        opened = await m.open()
        session = ids.parse_id(ids.ESCROW, opened["escrow_id"])
        yield Bench(m, session, opened["token"], await m.key_set())


async def test_both_sides_judge_every_edge_signature_alike(bench: Bench) -> None:
    """Over one real voucher: provider and escrow take the proper signature and no other."""
    proper = bench.payment.signed
    made = [raw for _, raw in curve.edge_signatures(SESSION_SEED, proper.raw)]
    found = [row["signature"] for row in WYCHEPROOF + SPECCHECK if len(row["signature"]) == 64]
    edges = [proper._replace(signature=raw) for raw in [*made, *found]]
    assert len(edges) > 250
    assert {bench.inspect(one) for one in edges} == {"signature"}
    assert set(await bench.redeem(edges)) == {"signature"}
    assert not any(verify_voucher(one, keys.public_key(SESSION_SEED)) for one in edges)
    assert bench.inspect(proper) == "ok"
    assert await bench.redeem([proper]) == ["ok"]


async def test_no_side_takes_an_edge_key(bench: Bench) -> None:
    """The escrow opens no session for such a key, and a provider opens no token that names one."""
    assert len(EDGE_KEYS) > 60
    for key in EDGE_KEYS:
        wish = bench.market.wish(session_key=b64url_encode(key))
        answer = await bench.market.post(bench.market.buyer, "/escrow", wish)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
        path = f"/journals/{bench.market.journal}"
        body = {"receipt_key": b64url_encode(key)}
        headers = bench.market.provider.headers
        assert (await bench.market.http.put(path, json=body, headers=headers)).status_code == 422
        for part in ("session_key", "receipt_key"):
            token = replace(payments.TOKEN, **{part: key})
            with pytest.raises(TokenRefused):
                payments.open_token(sign_session_token(token, payments.SIGNER))


async def test_both_sides_take_every_proper_key(bench: Bench) -> None:
    """The control: keys of valid vectors open sessions and tokens."""
    proper = {row["key"] for row in WYCHEPROOF if row["result"] == "valid"}
    for key in sorted(proper)[:40]:
        wish = bench.market.wish("1", session_key=b64url_encode(key))
        answer = await bench.market.post(bench.market.buyer, "/escrow", wish)
        assert answer.status_code == 201, answer.text
        token = replace(payments.TOKEN, session_key=key)
        assert payments.open_token(sign_session_token(token, payments.SIGNER)).session_key == key

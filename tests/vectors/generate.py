"""Writes the test vectors: `python -m tests.vectors.generate`. Nothing in them is random.

Each file is a list of cases that any language can replay; bytes are lower-case hex, times are whole
seconds or, where the name says so, milliseconds. `tests/core/test_vectors.py` replays them.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.support import payments as world
from tests.support.payments import BOOK, METERED, NOW, OFFERS, QUOTE, TOKEN, UPLOAD, Payment
from x402mw.core import gate, tokens, vouchers
from x402mw.core.amounts import Atomic
from x402mw.core.gate import Call, CallState, Outcome, Refused, Standing
from x402mw.core.sessions import Account, SessionState
from x402mw.core.strict import b64_encode, b64url_encode, dumps

HERE = Path(__file__).parent
Case = dict[str, Any]


def plain(record: Any, **more: Any) -> Case:
    """A record as JSON: bytes in hex."""
    fields = record._asdict() if isinstance(record, tuple) else dataclasses.asdict(record)
    return {
        name: value.hex() if isinstance(value, bytes) else value for name, value in fields.items()
    } | more


def networks() -> Iterator[Case]:
    """Network ids."""
    for name in (world.NETWORK, "escrow:main", "escrow:x"):
        for key in (world.ROOT_KEY, world.SIGNER_KEY):
            found = vouchers.network_id(name, key)
            yield {"network": name, "root_key": key.hex(), "network_id": found.hex()}


def terms() -> Iterator[Case]:
    """Terms, their ids, and the `accepts` entry that states them."""
    wide = replace(
        QUOTE, method="PUT", route="/datei/{größe:path}", pay_to="ag_ü", amount=Atomic(2**63 - 1)
    )
    for found in (QUOTE, UPLOAD, METERED, world.CONTROL, wide):
        yield plain(found, accepts=world.offer_of(found).accepts)


def requests() -> Iterator[Case]:
    """What is signed for, and its hash."""
    for payment in PAYMENTS:
        bound = payment.bound
        yield plain(bound, body=payment.body.hex(), hash=vouchers.hash_request(bound).hex())


PAYMENTS = [
    Payment(),
    Payment(seq=vouchers.SEQ_MAX, cumulative=2**63 - 1, target="/quote/BTC?depth=2&x=%C3%A9"),
    Payment(terms=UPLOAD, method="POST", target="/upload", binding=1, body=b"left out"),
    Payment(terms=METERED, method="POST", target="/summarize", body=b'{"text":"hi"}', seq=0),
    Payment(terms=world.CONTROL, method="POST", target=QUOTE.control, body=b'{"op":"close"}'),
]


def voucher_cases() -> Iterator[Case]:
    """Signed vouchers."""
    for payment in PAYMENTS:
        signed = payment.signed
        yield plain(
            signed.voucher,
            seed=payment.key.hex(),
            session_key=world.BUYER_KEY.hex(),
            raw=signed.raw.hex(),
            signature=signed.signature.hex(),
            wire=signed.wire,
            commitment_id=signed.commitment_id,
        )


def token_cases() -> Iterator[Case]:
    """Session tokens, receipts and key sets with the keys that signed them."""
    receipt = tokens.Receipt(
        network=world.NETWORK,
        session=world.SESSION,
        pay_to=world.PAY_TO,
        journal=world.JOURNAL,
        charged=Atomic(3100),
        open=Atomic(0),
        issued_at=NOW,
        final=True,
    )
    token = tokens.sign_session_token(TOKEN, world.SIGNER)
    kid = tokens.key_id(world.SIGNER_KEY)
    signed = replace(TOKEN, signed_by=kid)
    yield {
        "kind": "session",
        "key": world.SIGNER_KEY.hex(),
        "kid": kid,
        "text": token,
        "reads": plain(signed),
    }
    yield {
        "kind": "receipt",
        "key": world.RECEIPT_KEY.hex(),
        "kid": tokens.key_id(world.RECEIPT_KEY),
        "text": tokens.sign_receipt(receipt, world.RECEIPTS),
        "reads": plain(receipt),
    }
    yield {
        "kind": "keys",
        "key": world.ROOT_KEY.hex(),
        "kid": tokens.key_id(world.ROOT_KEY),
        "text": tokens.sign_key_set(world.KEY_SET, world.ROOT),
        "reads": {
            "network": world.NETWORK,
            "serial": 1,
            "not_after": world.KEY_SET.not_after,
            "keys": {kid: world.SIGNER_KEY.hex()},
            "min_escrow": 10_000,
            "claim_seconds": 300,
        },
    }


def header_cases() -> Iterator[Case]:
    """Headers and the JSON inside."""
    for payment in PAYMENTS:
        value = payment.header.decode()
        yield {"name": "PAYMENT-SIGNATURE", "value": value, "json": payment.content}
    required = {
        "x402Version": 2,
        "error": "Payment required",
        "resource": {"url": f"{world.ORIGIN}/quote/BTC"},
        "accepts": [OFFERS[QUOTE.id].accepts],
    }
    response = {
        "success": True,
        "transaction": Payment().signed.commitment_id,
        "network": world.NETWORK,
        "payer": world.PAYER,
        "amount": "1000",
        "extra": {
            "seq": "7",
            "state": "settled",
            "chargedTotal": "1000",
            "openTotal": "0",
            "final": True,
        },
    }
    for name, content in (("PAYMENT-REQUIRED", required), ("PAYMENT-RESPONSE", response)):
        yield {"name": name, "value": b64_encode(dumps(content)), "json": content}


SETTLED = Call(
    world.SESSION,
    7,
    bytes.fromhex(Payment().signed.commitment_id),
    Atomic(1000),
    CallState.SETTLED,
    Atomic(1000),
    Outcome(200, (), b"", b""),
)
OLD = replace(QUOTE, amount=Atomic(900))
CLOSING = Account(TOKEN.deposit, state=SessionState.CLOSING)
SPENT = Account(TOKEN.deposit, Atomic(1000), Atomic(600), Atomic(1))
FLIPPED = b64url_encode(Payment().signed.raw + bytes(64))

REFUSALS: list[tuple[str, Payment | str, dict[str, Any]]] = [
    ("not base64", "!!!!", {}),
    ("spare bits in base64", Payment().header.decode()[:-4] + "Zh==", {}),
    ("not JSON", "Zm9v", {}),
    ("a repeated key", b64_encode(b'{"x402Version":2,"x402Version":2}'), {}),
    ("too long", "A" * 4100, {}),
    ("an unknown key in the payload", Payment(changes={"more": 1}), {}),
    ("expires is true", Payment(changes={"expires": True}), {}),
    ("seq above 63 bits", Payment(changes={"voucher": "_" * 234 + "w"}), {}),
    ("the signature is zero", Payment(changes={"voucher": FLIPPED}), {}),
    ("signed by another key", Payment(key=world.SIGNER), {}),
    ("another session", Payment(session=bytes(16)), {}),
    ("another network", Payment(network_id=bytes(32)), {}),
    ("another journal", Payment(token=replace(TOKEN, journal=bytes(16))), {}),
    ("another payee", Payment(terms=replace(QUOTE, pay_to="ag_other")), {}),
    ("a payment of nothing", Payment(terms=world.CONTROL), {}),
    ("binding not allowed here", Payment(binding=1), {}),
    ("binding 2", Payment(binding=2), {}),
    ("another target", Payment(), {"target": "/quote/ETH"}),
    ("another query", Payment(), {"target": "/quote/BTC?x=1"}),
    ("another method", Payment(), {"method": "HEAD"}),
    ("another body", Payment(), {"body": b"x"}),
    ("another origin", Payment(), {"origin": "http://api.example.com"}),
    ("a changed expiry", Payment(changes={"expires": (NOW + 301) * 1000}), {}),
    ("moved after it was settled", Payment(), {"target": "/quote/ETH", "call": SETTLED}),
    ("running", Payment(), {"call": replace(SETTLED, state=CallState.OPEN)}),
    ("its answer is not kept", Payment(), {"call": replace(SETTLED, outcome=None)}),
    ("the seq is used", Payment(cumulative=2000), {"call": SETTLED}),
    ("used, and long expired", Payment(cumulative=2000), {"call": SETTLED, "now": NOW + 9999}),
    ("the session is closing", Payment(), {"account": CLOSING}),
    ("the token has expired", Payment(), {"now": NOW + 600}),
    ("the voucher has expired", Payment(), {"now": NOW + 420}),
    ("the voucher is too early", Payment(), {"now": NOW - 120}),
    ("terms never offered", Payment(terms=OLD), {}),
    ("terms retired too long ago", Payment(terms=OLD), {"retired_at": NOW - 300}),
    ("terms of another route", Payment(terms=METERED, target="/quote/BTC"), {}),
    ("not covered", Payment(), {"account": SPENT}),
    ("above the deposit", Payment(cumulative=1_000_001), {}),
    ("the escrow is away", Payment(), {"now": NOW + 600, "escrow_away": True}),
    ("sound", Payment(), {}),
    ("sound, at the last moment", Payment(token=replace(TOKEN, exp=NOW + 900)), {"now": NOW + 419}),
    ("sound, old terms in grace", Payment(terms=OLD), {"retired_at": NOW - 299}),
    ("sound, an identical late retry", Payment(), {"call": SETTLED, "now": NOW + 9999}),
]


def judge(case: Case) -> Case:
    """What the gate makes of a case: status 200 stands for "admitted or answered as before"."""
    given = case["context"]
    retired = {OLD.id: given["retired_at"]} if "retired_at" in given else {}
    book = replace(BOOK, retired=retired)
    call, account = read_call(given), read_account(given)
    try:
        claim = gate.inspect([case["header"].encode()], book, world.open_token)
        body_hash = hashlib.sha256(bytes.fromhex(given["body"])).digest()
        gate.bind(
            claim,
            method=given["method"],
            origin=given["origin"],
            target=given["target"],
            body_hash=body_hash,
        )
        gate.decide(
            claim,
            offer=OFFERS[QUOTE.id],
            book=book,
            standing=Standing(escrow_away=given["escrow_away"]),
            call=call,
            account=account,
            best=None,
            credentials=b"",
            now=given["now"],
        )
    except Refused as refused:
        return {"status": refused.status, "reason": refused.reason, "final": refused.final}
    return {"status": 200, "reason": "", "final": False}


def read_call(given: Case) -> Call | None:
    """The row of (session, seq) in a case's context."""
    row = given["call"]
    if row is None:
        return None
    return replace(
        SETTLED,
        commitment=bytes.fromhex(row["commitment"]),
        state=CallState(row["state"]),
        outcome=SETTLED.outcome if row["outcome_kept"] else None,
    )


def read_account(given: Case) -> Account | None:
    """The session's account in a case's context."""
    row = given["account"]
    if row is None:
        return None
    amounts = {name: Atomic(row[name]) for name in ("deposit", "best", "charged", "reserved")}
    return Account(**amounts, state=SessionState(row["state"]))


def refusals() -> Iterator[Case]:
    """Headers in a context, and what a provider answers."""
    for name, payment, changes in REFUSALS:
        header = payment if isinstance(payment, str) else payment.header.decode()
        call, account = changes.get("call"), changes.get("account")
        context = {"now": NOW, "method": "GET", "origin": world.ORIGIN, "target": "/quote/BTC"}
        context |= {"escrow_away": False, **changes, "body": changes.get("body", b"").hex()}
        context["account"] = account and dataclasses.asdict(account)
        context["call"] = call and {
            "commitment": call.commitment.hex(),
            "state": call.state.value,
            "outcome_kept": call.outcome is not None,
        }
        case = {"name": name, "header": header, "context": context}
        yield case | {"answer": judge(case)}


def provider() -> Iterator[Case]:
    """The one provider that all refusals are judged by."""
    yield {
        "network": world.NETWORK,
        "root_key": world.ROOT_KEY.hex(),
        "key_set": tokens.sign_key_set(world.KEY_SET, world.ROOT),
        "pay_to": world.PAY_TO,
        "journal": world.JOURNAL.hex(),
        "asset": "USDC",
        "offers": [offer.accepts for offer in OFFERS.values()],
        "retired_terms": OLD.id.hex(),
    }


FILES = {
    "networks": networks,
    "terms": terms,
    "requests": requests,
    "vouchers": voucher_cases,
    "tokens": token_cases,
    "headers": header_cases,
    "provider": provider,
    "refusals": refusals,
}


def write(name: str) -> str:
    """The text of one vector file."""
    return json.dumps(list(FILES[name]()), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for file in FILES:
        (HERE / f"{file}.json").write_text(write(file))

"""The test vectors, replayed as another language would: from JSON, hashes and Ed25519 alone."""

import base64
import hashlib
import json
import struct
from typing import Any

import pytest
from nacl.signing import SigningKey, VerifyKey

from tests.vectors import generate
from x402mw.core import headers, messages, signed, tokens
from x402mw.core.tokens import KeySet


def cases(name: str) -> list[Any]:
    """The cases of one file."""
    found: list[Any] = json.loads((generate.HERE / f"{name}.json").read_text())
    return found


def lp(size: int, text: str) -> bytes:
    """A text with its length before it."""
    raw = text.encode()
    return len(raw).to_bytes(size, "big") + raw


def sha(*parts: bytes) -> str:
    """Hex SHA-256 of the joined parts."""
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.mark.parametrize("name", generate.FILES)
def test_the_vectors_are_what_the_script_writes(name: str) -> None:
    """The checked-in files are fresh and do not depend on the run."""
    assert (generate.HERE / f"{name}.json").read_text() == generate.write(name)


@pytest.mark.parametrize("case", cases("networks"))
def test_network_ids(case: dict[str, Any]) -> None:
    """A network id is the hash of a tag, the network's text and its root key."""
    key = bytes.fromhex(case["root_key"])
    assert case["network_id"] == sha(b"x402mw/network\0\1", lp(2, case["network"]), key)


@pytest.mark.parametrize("case", cases("terms"))
def test_terms_ids(case: dict[str, Any]) -> None:
    """Terms hash field by field in the order of `docs/protocol.md`."""
    found = sha(
        b"x402mw/terms\0\1",
        bytes.fromhex(case["network_id"]),
        lp(2, case["pay_to"]),
        bytes.fromhex(case["journal"]),
        lp(2, case["asset"]),
        struct.pack(">QIB", case["amount"], case["timeout_seconds"], case["binding"]),
        lp(2, case["unit"]),
        struct.pack(">QQQ", case["unit_price"], case["per"], case["base"]),
        lp(2, case["method"]),
        lp(2, case["route"]),
        lp(2, case["control"]),
    )
    assert case["id"] == found == case["accepts"]["extra"]["terms"]


@pytest.mark.parametrize("case", cases("requests"))
def test_request_hashes(case: dict[str, Any]) -> None:
    """A request hashes to what its voucher signs."""
    body_hash = hashlib.sha256(bytes.fromhex(case["body"])).digest()
    if case["binding"] == 1:
        body_hash = bytes(32)
    assert case["body_hash"] == body_hash.hex()
    found = sha(
        b"x402mw/request\0\1",
        bytes([case["binding"]]),
        lp(2, case["method"]),
        lp(2, case["origin"]),
        lp(4, case["target"]),
        body_hash,
        struct.pack(">QQ", case["amount"], case["expires"]),
        bytes.fromhex(case["terms_id"]),
    )
    assert case["hash"] == found


@pytest.mark.parametrize("case", cases("vouchers"))
def test_vouchers(case: dict[str, Any]) -> None:
    """112 bytes, one signature, one wire form, one id."""
    raw = b"".join(
        (
            b"x402mw/voucher\0\1",
            bytes.fromhex(case["network"]),
            bytes.fromhex(case["session"]),
            struct.pack(">QQ", case["seq"], case["cumulative"]),
            bytes.fromhex(case["request_hash"]),
        )
    )
    assert len(raw) == 112
    assert case["raw"] == raw.hex()
    key = SigningKey(bytes.fromhex(case["seed"]))
    assert key.verify_key.encode().hex() == case["session_key"]
    signature = bytes.fromhex(case["signature"])
    assert key.sign(raw).signature == signature
    wire = base64.urlsafe_b64encode(raw + signature).rstrip(b"=").decode()
    assert (case["wire"], len(wire)) == (wire, 235)
    assert case["commitment_id"] == sha(raw)


@pytest.mark.parametrize("case", cases("tokens"), ids=lambda case: case["kind"])
def test_tokens(case: dict[str, Any]) -> None:
    """Tokens, receipts and key sets verify as plain JWS and read as stated."""
    key = bytes.fromhex(case["key"])
    head, body, signature = case["text"].split(".")
    VerifyKey(key).verify(f"{head}.{body}".encode(), base64.urlsafe_b64decode(signature + "=="))
    thumbprint = signed.key_id(key)
    assert case["kid"] == thumbprint
    if case["kind"] == "session":
        keys = KeySet("escrow:test", 1, 0, {thumbprint: key}, frozenset(), tokens.Atomic(0), 300)
        assert generate.plain(tokens.open_session_token(case["text"], keys)) == case["reads"]
    elif case["kind"] == "receipt":
        assert generate.plain(tokens.open_receipt(case["text"], key)) == case["reads"]
    else:
        found = tokens.open_key_set(case["text"], key)
        assert (found.network, found.serial) == ("escrow:test", case["reads"]["serial"])
        assert {kid: raw.hex() for kid, raw in found.keys.items()} == case["reads"]["keys"]


MODELS: dict[str, tuple[type[messages.BaseModel], int]] = {
    "PAYMENT-REQUIRED": (messages.PaymentRequired, headers.REQUIRED_BYTES_MAX),
    "PAYMENT-SIGNATURE": (messages.PaymentPayload, headers.SIGNATURE_BYTES_MAX),
    "PAYMENT-RESPONSE": (messages.SettlementResponse, headers.RESPONSE_BYTES_MAX),
}


@pytest.mark.parametrize("case", cases("headers"))
def test_headers(case: dict[str, Any]) -> None:
    """A header is base64 of JSON, and its message reads and writes without loss."""
    assert json.loads(base64.b64decode(case["value"])) == case["json"]
    model, bytes_max = MODELS[case["name"]]
    message = headers.decode_header(model, case["value"].encode(), bytes_max)
    assert messages.as_json(message) == case["json"]


@pytest.mark.parametrize("case", cases("refusals"), ids=lambda case: case["name"])
def test_refusals(case: dict[str, Any]) -> None:
    """The gate answers each header in its context as the vector says."""
    assert generate.judge(case) == case["answer"]
    assert case["name"].startswith("sound") == (case["answer"]["status"] == 200)

"""The signed artefacts that fuzzing starts from, and how to sign bent ones again.

All keys are those of `tests.support.payments`: a mutated claim with a good signature reaches the
checks behind the signature, which is where a liar with a key of its own would try.
"""

import struct
from random import Random
from typing import Any

from tests.fuzz.mutators import (
    bend_json,
    flip,
    read_base64,
    read_json,
    respell_base64,
    write_base64,
    write_json,
)
from tests.support import payments
from x402mw.core import keys, tokens, vouchers
from x402mw.core.amounts import Atomic
from x402mw.core.strict import b64url_decode, b64url_encode, dumps
from x402mw.core.terms import Terms

SIGNERS = {
    tokens.TOKEN_TYPE: payments.SIGNER,
    tokens.RECEIPT_TYPE: payments.RECEIPTS,
    tokens.KEYS_TYPE: payments.ROOT,
}
LAYOUT = struct.Struct(">16s32s16sQQ32s")
RECEIPT = tokens.Receipt(
    network=payments.NETWORK,
    session=payments.SESSION,
    pay_to=payments.PAY_TO,
    journal=payments.JOURNAL,
    charged=Atomic(5000),
    open=Atomic(1000),
    issued_at=payments.NOW,
    final=True,
)


def sign_parts(header: bytes, claims: bytes, seed: bytes) -> bytes:
    """A compact JWS over any bytes."""
    signed = f"{b64url_encode(header)}.{b64url_encode(claims)}".encode()
    signature = keys.sign(keys.secret_key(seed), signed)
    return signed + b"." + b64url_encode(signature).encode()


def bend_token(text: bytes, draw: Random) -> bytes:
    """Bends a JWS: as text, in a part, or in its claims or header, which are then signed again."""
    parts = text.split(b".")
    act = draw.randrange(8)
    raw = [read_base64(part) for part in parts]
    if len(parts) != 3 or act == 0 or None in raw:
        return flip(text, draw)
    if act == 1:
        at = draw.randrange(3)
        bent = write_base64(flip(raw[at] or b"", draw), draw, url=True)
        parts[at] = draw.choice((bent, respell_base64(parts[at], draw)))
        return b".".join(parts)
    header, claims = read_json(raw[0] or b""), read_json(raw[1] or b"")
    if not isinstance(header, dict) or claims is None:
        return flip(text, draw)
    seed = SIGNERS.get(str(header.get("typ")), payments.SIGNER)
    if act == 2:
        return sign_parts(write_json(bend_json(header, draw), draw), compact(claims), seed)
    bent = bend_json(claims, draw, times=draw.choice((1, 1, 2, 3)))
    written = write_json(bent, draw) if act == 3 else compact(bent)
    return sign_parts(compact(header), written, seed)


def compact(value: Any) -> bytes:
    """JSON as we write it, of any text."""
    return dumps(value) if _is_text(value) else write_json(value, Random(0))


def _is_text(value: Any) -> bool:
    try:
        dumps(value)
    except UnicodeEncodeError:
        return False
    return True


def bend_voucher(wire: bytes, draw: Random) -> bytes:
    """Bends a voucher: as text, in its bytes, or in a field, which is then signed again."""
    try:
        raw = b64url_decode(wire.decode(), vouchers.SIGNED_BYTES)
    except Exception:
        return flip(wire, draw)
    act = draw.randrange(6)
    if act == 0:
        return flip(wire, draw)
    if act == 1:
        bent = write_base64(flip(raw, draw), draw, url=True)
        return draw.choice((bent, respell_base64(wire, draw)))
    fields = list(LAYOUT.unpack(raw[: vouchers.VOUCHER_BYTES]))
    at = draw.randrange(len(fields))
    if isinstance(fields[at], int):
        fields[at] = draw.choice((0, 1, 2**63 - 1, 2**63, 2**64 - 1, fields[at] ^ 1, 1000))
    else:
        fields[at] = (flip(fields[at], draw) + bytes(32))[: len(fields[at])]
    message = LAYOUT.pack(*fields)
    signature = keys.sign(keys.secret_key(payments.BUYER), message)
    return b64url_encode(message + (raw[112:] if act == 2 else signature)).encode()


def bend_header(value: bytes, draw: Random) -> bytes:
    """Bends a header: as text, as base64, in its JSON, or in what is signed inside it."""
    raw = read_base64(value)
    content = None if raw is None else read_json(raw)
    act = draw.randrange(10)
    if act == 0 or raw is None:
        return flip(value, draw)
    if act == 1 or not isinstance(content, dict):
        return write_base64(flip(raw, draw), draw)
    inner = content.get("payload")
    if isinstance(inner, dict) and act in (2, 3):
        name, bend = draw.choice((("voucher", bend_voucher), ("token", bend_token)))
        inner[name] = bend(str(inner.get(name)).encode("utf-8", "replace"), draw).decode(
            "utf-8", "replace"
        )
        return write_base64(compact(content), draw)
    bent = bend_json(content, draw, times=draw.choice((1, 1, 1, 2, 4)))
    if act in (4, 5):
        _name_terms(bent)
    return write_base64(write_json(bent, draw), draw)


def bend_offer(value: bytes, draw: Random) -> bytes:
    """Bends one entry of `accepts`, and often gives it the terms id of what it now says."""
    content = read_json(value)
    if not isinstance(content, dict):
        return flip(value, draw)
    bent = bend_json(content, draw, times=draw.choice((1, 1, 2)))
    if draw.randrange(4):
        _name_terms({"accepted": bent})
    return write_json(bent, draw)


def _name_terms(content: Any) -> None:
    """Writes the right terms ids into a message, wherever that can be done."""
    if not isinstance(content, dict):
        return
    offers = content.get("accepts")
    for offer in [content.get("accepted"), *(offers if isinstance(offers, list) else [])]:
        try:
            offer["extra"]["terms"] = _loose_terms(offer).id.hex()
        except Exception:
            continue  # what has no terms keeps the id that it has


def _loose_terms(offer: dict[str, Any]) -> Terms:
    extra = offer["extra"]
    method, _, route = extra["route"].partition(" ")
    return Terms(
        network=offer["network"],
        network_id=payments.NETWORK_ID,
        pay_to=offer["payTo"],
        journal=bytes.fromhex(extra["journal"].removeprefix("jr_")),
        asset=offer["asset"],
        amount=Atomic(int(offer["amount"])),
        timeout_seconds=offer["maxTimeoutSeconds"],
        binding=extra["binding"],
        unit=extra.get("unit", ""),
        unit_price=int(extra.get("unitPrice", "0")),
        per=extra.get("per", 0),
        base=Atomic(int(extra.get("base", "0"))),
        method=method.replace("HEAD", "GET"),
        route=route,
        control=extra["control"],
    )

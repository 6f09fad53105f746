"""The voucher: 112 bytes that are both the money and the authority for one request.

     0  16  tag          "x402mw/voucher" 00 01
    16  32  network id   which escrow, by its root key
    48  16  session id
    64   8  seq          63 random bits: the identity of one logical request
    72   8  cumulative   the most the provider may ever have redeemed in this session
    80  32  request hash what the signature is for

Big-endian throughout; on the wire base64url(voucher || signature). `docs/protocol.md`, Vouchers.
The provider and the escrow judge vouchers with the same `verify_voucher`.
"""

import hashlib
import struct
from typing import NamedTuple

from x402mw.core.amounts import AMOUNT_MAX, Atomic
from x402mw.core.errors import Malformed
from x402mw.core.keys import SIGNATURE_BYTES, sign, verify
from x402mw.core.strict import b64url_decode, b64url_encode

VOUCHER_TAG = b"x402mw/voucher\x00\x01"
REQUEST_TAG = b"x402mw/request\x00\x01"
NETWORK_TAG = b"x402mw/network\x00\x01"

VOUCHER_BYTES = 112
SIGNED_BYTES = VOUCHER_BYTES + SIGNATURE_BYTES
WIRE_CHARACTERS = 235
SEQ_MAX = 2**63 - 1
HASH_BYTES = 32
NO_BODY_HASH = bytes(HASH_BYTES)

BIND_BODY, BIND_REQUEST, BIND_TERMS = 0, 1, 2
"""What the request hash covers: request and body; request only; terms only (refused for now)."""

_LAYOUT = struct.Struct(">16s32s16sQQ32s")


class Voucher(NamedTuple):
    """The fields of a voucher. `network`, `session` and `request_hash` are raw bytes."""

    network: bytes
    session: bytes
    seq: int
    cumulative: Atomic
    request_hash: bytes


class SignedVoucher(NamedTuple):
    """A voucher together with the exact bytes that were signed."""

    voucher: Voucher
    raw: bytes
    signature: bytes

    @property
    def commitment_id(self) -> str:
        """The payment's id everywhere: hex SHA-256 of the 112 bytes."""
        return hashlib.sha256(self.raw).hexdigest()

    @property
    def wire(self) -> str:
        """The 235 characters that travel in `payload.voucher`."""
        return b64url_encode(self.raw + self.signature)


class BoundRequest(NamedTuple):
    """What one signature is for. `expires` is in milliseconds since the epoch."""

    binding: int
    method: str
    origin: str
    target: str
    body_hash: bytes
    amount: Atomic
    expires: int
    terms_id: bytes


def sign_voucher(voucher: Voucher, secret: bytes) -> SignedVoucher:
    """Signs a voucher with the session's 64-byte secret key (`keys.secret_key`)."""
    raw = _LAYOUT.pack(
        VOUCHER_TAG,
        voucher.network,
        voucher.session,
        voucher.seq,
        voucher.cumulative,
        voucher.request_hash,
    )
    return SignedVoucher(voucher, raw, sign(secret, raw))


def verify_voucher(signed: SignedVoucher, session_key: bytes) -> bool:
    """Tells whether the session key signed this voucher."""
    return verify(session_key, signed.raw, signed.signature)


def parse_voucher(wire: str) -> SignedVoucher:
    """Reads the wire form, or raises `Malformed`; the signature is not checked yet."""
    return split_voucher(b64url_decode(wire, SIGNED_BYTES))


def split_voucher(signed: bytes) -> SignedVoucher:
    """Reads the 176 raw bytes of a signed voucher, or raises `Malformed`."""
    if len(signed) != SIGNED_BYTES:
        raise Malformed(f"a signed voucher has {SIGNED_BYTES} bytes")
    raw = signed[:VOUCHER_BYTES]
    tag, network, session, seq, cumulative, request_hash = _LAYOUT.unpack(raw)
    if tag != VOUCHER_TAG:
        raise Malformed("these bytes are not a voucher of a version known here")
    if seq > SEQ_MAX or cumulative > AMOUNT_MAX:
        raise Malformed("seq and cumulative are numbers below 2^63")
    voucher = Voucher(network, session, seq, Atomic(cumulative), request_hash)
    return SignedVoucher(voucher, raw, signed[VOUCHER_BYTES:])


def network_id(network: str, root_key: bytes) -> bytes:
    """Names an escrow by its network text and root key, so rotating signing keys breaks nothing."""
    return hashlib.sha256(NETWORK_TAG + lp(16, network) + root_key).digest()


def hash_request(bound: BoundRequest) -> bytes:
    """Hashes what a voucher is for (`docs/protocol.md`, Request hash)."""
    parts = (
        REQUEST_TAG,
        bound.binding.to_bytes(1, "big"),
        lp(16, bound.method),
        lp(16, bound.origin),
        lp(32, bound.target),
        bound.body_hash,
        bound.amount.to_bytes(8, "big"),
        bound.expires.to_bytes(8, "big"),
        bound.terms_id,
    )
    return hashlib.sha256(b"".join(parts)).digest()


def lp(bits: int, text: str) -> bytes:
    """Prefixes a text's UTF-8 bytes with their count, so that no two field lists run together."""
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        raise Malformed("half a character (a lone surrogate) cannot be signed") from None
    if len(raw) >= 2**bits:
        raise Malformed("a text is too long for its place in a signed message")
    return len(raw).to_bytes(bits // 8, "big") + raw

"""What the oracle of a conditional escrow signs: this outcome, of this escrow and no other."""

import hashlib

from x402mw.core.keys import secret_key, sign

OUTCOME_TAG = b"x402mw/outcome\x00\x01"


def outcome_message(escrow: bytes, outcome: str) -> bytes:
    """The tag, the 16 bytes of the escrow's id, and the SHA-256 of the outcome in UTF-8."""
    return OUTCOME_TAG + escrow + hashlib.sha256(outcome.encode()).digest()


def sign_outcome(escrow: bytes, outcome: str, seed: bytes) -> bytes:
    """The oracle's signature (64 bytes); `seed` is its Ed25519 seed of 32 bytes."""
    return sign(secret_key(seed), outcome_message(escrow, outcome))

"""What makes the escrow's books provable elsewhere: signed checkpoints, and proofs of signing keys.

A checkpoint is the escrow's word that the chain of its entries had this hash at this number. It is
signed with a signing key, and the root key vouches for every signing key there ever was, so books
of any age verify under the root key alone. `docs/audit.md`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from x402mw.core.errors import TokenRefused
from x402mw.core.signed import (
    Key,
    Seconds,
    SignedClaims,
    key_id,
    open_signed,
    parse_claims,
    sign,
)
from x402mw.core.strict import b64url_encode

CHECKPOINT_TYPE = "x402mw-checkpoint+jwt"
PROOF_TYPE = "x402mw-signing-key+jwt"
CHARACTERS_MAX = 1024


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The chain of `network` had `hash` at entry `seq`; said at `created_at` (seconds)."""

    network: str
    seq: int
    hash: str
    created_at: int


def sign_checkpoint(checkpoint: Checkpoint, seed: bytes) -> str:
    """Writes and signs a checkpoint with one of the escrow's signing keys."""
    claims = {
        "iss": checkpoint.network,
        "seq": checkpoint.seq,
        "hash": checkpoint.hash,
        "iat": checkpoint.created_at,
    }
    return sign(CHECKPOINT_TYPE, claims, seed)


def open_checkpoint(text: str, keys: Mapping[str, bytes]) -> Checkpoint:
    """Reads a checkpoint signed by one of these keys (by key id), or raises `TokenRefused`."""
    claims, _ = open_signed(text, CHECKPOINT_TYPE, keys, CHARACTERS_MAX)
    body = parse_claims(_CheckpointClaims, claims)
    return Checkpoint(body.iss, body.seq, body.hash, body.iat)


def sign_key_proof(network: str, number: int, key: bytes, root_seed: bytes) -> str:
    """The root key's word that this is a signing key of the network; it admits nothing."""
    claims = {"iss": network, "number": number, "x": b64url_encode(key)}
    return sign(PROOF_TYPE, claims, root_seed)


def open_key_proof(text: str, network: str, root_key: bytes) -> tuple[str, bytes]:
    """Returns key id and public key of a signing key, or raises `TokenRefused`."""
    claims, _ = open_signed(text, PROOF_TYPE, {key_id(root_key): root_key}, CHARACTERS_MAX)
    body = parse_claims(_ProofClaims, claims)
    if body.iss != network:
        raise TokenRefused("the signing key is another network's")
    return key_id(body.x), body.x


class _CheckpointClaims(SignedClaims):
    iss: str
    seq: Annotated[int, Field(ge=1, lt=2**63)]
    hash: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    iat: Seconds


class _ProofClaims(SignedClaims):
    iss: str
    number: Annotated[int, Field(ge=1, lt=2**53)]
    x: Key

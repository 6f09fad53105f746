"""Checkpoints and key proofs: signed by the right key, of the right kind, and nothing else."""

import pytest

from tests.support import payments as world
from x402mw.core import checkpoints as cp
from x402mw.core.errors import TokenRefused, UnknownKey
from x402mw.core.keys import public_key
from x402mw.core.signed import key_id, sign
from x402mw.core.tokens import TOKEN_TYPE

POINT = cp.Checkpoint(world.NETWORK, 7, "ab" * 32, world.NOW)
KEYS = {key_id(world.SIGNER_KEY): world.SIGNER_KEY}
ROOT_KEY = public_key(world.ROOT)


def test_a_checkpoint_reads_back() -> None:
    """What the escrow signs about its books reads back under its key."""
    assert cp.open_checkpoint(cp.sign_checkpoint(POINT, world.SIGNER), KEYS) == POINT


def test_a_proof_names_a_key_of_one_network() -> None:
    """The root key vouches for a signing key of its own network only."""
    proof = cp.sign_key_proof(world.NETWORK, 1, world.SIGNER_KEY, world.ROOT)
    assert dict([cp.open_key_proof(proof, world.NETWORK, ROOT_KEY)]) == KEYS
    with pytest.raises(TokenRefused, match="another network"):
        cp.open_key_proof(proof, "escrow:other", ROOT_KEY)


def test_one_signed_thing_is_no_other() -> None:
    """Replay: a token is no checkpoint, a proof is none, and a stranger's signature is nothing."""
    claims = {"iss": world.NETWORK, "seq": 7, "hash": "ab" * 32, "iat": world.NOW}
    with pytest.raises(TokenRefused, match="typ"):
        cp.open_checkpoint(sign(TOKEN_TYPE, claims, world.SIGNER), KEYS)
    proof = cp.sign_key_proof(world.NETWORK, 1, world.SIGNER_KEY, world.SIGNER)
    with pytest.raises(TokenRefused, match="typ"):
        cp.open_checkpoint(proof, KEYS)
    with pytest.raises(UnknownKey):
        cp.open_checkpoint(sign(cp.CHECKPOINT_TYPE, claims, world.ROOT), KEYS)
    for wrong in ({"seq": 0}, {"hash": "AB" * 32}, {"iat": "1"}, {"iss": 1}):
        text = sign(cp.CHECKPOINT_TYPE, claims | wrong, world.SIGNER)
        with pytest.raises(TokenRefused, match="claim"):
            cp.open_checkpoint(text, KEYS)

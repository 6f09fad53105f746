"""Ed25519, by libsodium alone, on every side of the protocol.

Two libraries may disagree about edge keys and edge signatures; money must not. So vouchers are
signed and verified here and nowhere else, and every public key of any kind first passes
`check_public_key` (`docs/protocol.md`, Keys). Making a key needs randomness, so that
is not done here.
"""

from nacl import bindings
from nacl.exceptions import BadSignatureError

from x402mw.core.errors import KeyRefused

SEED_BYTES = 32
PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64


def public_key(seed: bytes) -> bytes:
    """Returns the raw public key (32 bytes) of a 32-byte seed."""
    public, _ = bindings.crypto_sign_seed_keypair(seed)
    return bytes(public)


def check_public_key(raw: bytes) -> bytes:
    """Returns the key if it is a canonical point of the main subgroup, else raises `KeyRefused`."""
    if len(raw) != PUBLIC_KEY_BYTES or not bindings.crypto_core_ed25519_is_valid_point(raw):
        raise KeyRefused("this is not a usable Ed25519 public key")
    return raw


def secret_key(seed: bytes) -> bytes:
    """Returns the 64-byte secret key of a 32-byte seed: derive once, sign often."""
    _, secret = bindings.crypto_sign_seed_keypair(seed)
    return bytes(secret)


def sign(secret: bytes, message: bytes) -> bytes:
    """Signs a message with a 64-byte secret key; the signature has 64 bytes."""
    return bytes(bindings.crypto_sign(message, secret)[:SIGNATURE_BYTES])


def verify(key: bytes, message: bytes, signature: bytes) -> bool:
    """Tells whether `signature` over `message` is by `key`, which must have passed the check."""
    if len(signature) != SIGNATURE_BYTES:
        return False
    try:
        bindings.crypto_sign_open(signature + message, key)
    except BadSignatureError:
        return False
    return True

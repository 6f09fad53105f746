"""Ed25519: weak keys and loose signatures are refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.payments import BUYER, BUYER_KEY
from x402mw.core import keys
from x402mw.core.errors import KeyRefused

ORDER = 2**252 + 27742317777372353535851937790883648493
PRIME = 2**255 - 19
LOW_ORDER = [
    "0100000000000000000000000000000000000000000000000000000000000000",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
]
NOT_CANONICAL = [
    (PRIME + 1).to_bytes(32, "little").hex(),
    PRIME.to_bytes(32, "little").hex(),
    (PRIME + 3).to_bytes(32, "little").hex(),
    "ff" * 32,
    "0100000000000000000000000000000000000000000000000000000000000080",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
]


@pytest.mark.parametrize("text", LOW_ORDER + NOT_CANONICAL + ["", "00" * 31, "01" * 33])
def test_weak_keys_are_refused(text: str) -> None:
    """Low-order points, other spellings of a point, and other sizes are no keys."""
    with pytest.raises(KeyRefused):
        keys.check_public_key(bytes.fromhex(text))


def test_a_proper_key_passes() -> None:
    """A key made from a seed is returned as it is."""
    assert keys.check_public_key(BUYER_KEY) == BUYER_KEY == keys.public_key(BUYER)


@given(st.binary(max_size=60))
def test_a_signature_verifies_only_its_message(message: bytes) -> None:
    """A signature is good for one message and one key."""
    signature = keys.sign(keys.secret_key(BUYER), message)
    assert len(signature) == keys.SIGNATURE_BYTES
    assert keys.verify(BUYER_KEY, message, signature)
    assert not keys.verify(BUYER_KEY, message + b"x", signature)
    assert not keys.verify(keys.public_key(bytes(32)), message, signature)


def test_a_larger_s_is_refused() -> None:
    """S + L would verify under loose rules; it is another text of the same signature."""
    signature = keys.sign(keys.secret_key(BUYER), b"message")
    s = int.from_bytes(signature[32:], "little")
    for larger in range(s + ORDER, 2**256, ORDER):
        loose = signature[:32] + larger.to_bytes(32, "little")
        assert not keys.verify(BUYER_KEY, b"message", loose)


@pytest.mark.parametrize("size", [0, 63, 65])
def test_another_size_is_no_signature(size: int) -> None:
    """Bytes never move from the message into the signature."""
    signature = keys.sign(keys.secret_key(BUYER), b"message")
    joined = signature + b"message"
    assert not keys.verify(BUYER_KEY, joined[size:], joined[:size])

"""Vouchers: 112 bytes, one spelling, one signature."""

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.payments import BUYER, BUYER_KEY, NETWORK_ID, ROOT_KEY, SESSION, Payment
from x402mw.core import keys, vouchers
from x402mw.core.amounts import AMOUNT_MAX, Atomic
from x402mw.core.errors import Malformed
from x402mw.core.vouchers import BoundRequest, Voucher

SIGNED = Payment().signed
BOUND = Payment().bound


@given(
    st.integers(0, vouchers.SEQ_MAX),
    st.integers(0, AMOUNT_MAX),
    st.binary(min_size=32, max_size=32),
)
def test_a_voucher_reads_back(seq: int, cumulative: int, request_hash: bytes) -> None:
    """Every voucher survives its wire form and verifies under its key."""
    voucher = Voucher(NETWORK_ID, SESSION, seq, Atomic(cumulative), request_hash)
    signed = vouchers.sign_voucher(voucher, keys.secret_key(BUYER))
    assert len(signed.wire) == vouchers.WIRE_CHARACTERS
    assert vouchers.parse_voucher(signed.wire) == signed
    assert vouchers.split_voucher(signed.raw + signed.signature).voucher == voucher
    assert vouchers.verify_voucher(signed, BUYER_KEY)
    assert signed.commitment_id == hashlib.sha256(signed.raw).hexdigest()


def test_every_flipped_bit_is_refused() -> None:
    """No single bit of the 176 bytes can change without the voucher being refused."""
    whole = SIGNED.raw + SIGNED.signature
    for bit in range(len(whole) * 8):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            changed = vouchers.split_voucher(bytes(flipped))
        except Malformed:
            continue
        assert not vouchers.verify_voucher(changed, BUYER_KEY), f"bit {bit}"


def test_every_changed_character_is_refused() -> None:
    """No other wire text has the same meaning, the last character's spare bits included."""
    for place in range(vouchers.WIRE_CHARACTERS):
        for letter in "Aw9-_=+/ \n":
            text = SIGNED.wire[:place] + letter + SIGNED.wire[place + 1 :]
            try:
                changed = vouchers.parse_voucher(text)
            except Malformed:
                continue
            assert text == SIGNED.wire or not vouchers.verify_voucher(changed, BUYER_KEY)


@pytest.mark.parametrize("size", [0, 112, 175, 177])
def test_another_size_is_no_voucher(size: int) -> None:
    """A signed voucher has exactly 176 bytes."""
    with pytest.raises(Malformed):
        vouchers.split_voucher(bytes(size))


@pytest.mark.parametrize("place", [64, 72])
def test_numbers_have_63_bits(place: int) -> None:
    """Seq and cumulative stay below 2^63, so that every database holds them."""
    raw = bytearray(SIGNED.raw + SIGNED.signature)
    raw[place] |= 0x80
    with pytest.raises(Malformed):
        vouchers.split_voucher(bytes(raw))


CHANGES: dict[str, Any] = {
    "binding": 1,
    "method": "PUT",
    "origin": "https://api.example.com:444",
    "target": "/quote/BTC?",
    "body_hash": hashlib.sha256(b"x").digest(),
    "amount": Atomic(1001),
    "expires": BOUND.expires + 1,
    "terms_id": bytes(32),
}


@pytest.mark.parametrize("name", BoundRequest._fields)
def test_the_request_hash_covers_every_field(name: str) -> None:
    """Changing any one thing that is signed for changes the hash."""
    changed = BOUND._replace(**{name: CHANGES[name]})
    assert vouchers.hash_request(changed) != vouchers.hash_request(BOUND)


@given(st.text(max_size=6), st.text(max_size=6), st.text(max_size=6))
def test_fields_never_run_together(method: str, origin: str, target: str) -> None:
    """A character moved from one text to the next gives another hash."""
    one = BOUND._replace(method=method + "x", origin=origin, target=target)
    other = BOUND._replace(method=method, origin="x" + origin, target=target)
    assert vouchers.hash_request(one) != vouchers.hash_request(other)


def test_a_network_is_its_name_and_its_root() -> None:
    """Another name or another root key is another network."""
    ids = {
        vouchers.network_id("escrow:test", ROOT_KEY),
        vouchers.network_id("escrow:tes", ROOT_KEY),
        vouchers.network_id("escrow:test", BUYER_KEY),
    }
    assert len(ids) == 3


@pytest.mark.parametrize("text", ["x" * 2**16, "\ud800"])
def test_what_cannot_be_framed_is_malformed(text: str) -> None:
    """A text too long for its count, or with half a character, is a typed refusal."""
    with pytest.raises(Malformed):
        vouchers.lp(16, text)

"""Payment headers: size first, then base64, then JSON."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.payments import METERED, Payment, header_size
from x402mw.core import headers
from x402mw.core.errors import Malformed
from x402mw.core.messages import PaymentPayload


def test_a_payment_fits_its_limit() -> None:
    """A payment with everything in it takes little more than half of the 4 KiB."""
    assert header_size(Payment(terms=METERED).content) < headers.SIGNATURE_BYTES_MAX * 2 // 3


def test_a_long_header_is_not_decoded() -> None:
    """One byte above the limit is refused for its length alone."""
    with pytest.raises(Malformed, match="longer than 4096"):
        headers.decode_header(PaymentPayload, b"!" * 4097, headers.SIGNATURE_BYTES_MAX)


@given(st.binary(max_size=200))
def test_any_bytes_are_malformed(value: bytes) -> None:
    """Header bytes of any kind are a typed refusal."""
    with pytest.raises(Malformed):
        headers.decode_header(PaymentPayload, value, headers.SIGNATURE_BYTES_MAX)


@given(st.data())
def test_a_damaged_header_never_fails_otherwise(data: st.DataObject) -> None:
    """A valid header with one byte replaced parses or is malformed."""
    whole = bytearray(Payment().header)
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(Malformed):
        headers.decode_header(PaymentPayload, bytes(whole), headers.SIGNATURE_BYTES_MAX)

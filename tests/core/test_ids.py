"""Ids: a prefix and 32 hex digits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x402mw.core import ids
from x402mw.core.errors import Malformed


@given(st.binary(min_size=16, max_size=16), st.sampled_from([ids.AGENT, ids.ESCROW, ids.JOURNAL]))
def test_an_id_reads_back(raw: bytes, prefix: str) -> None:
    """Sixteen bytes survive being written as an id."""
    assert ids.parse_id(prefix, ids.format_id(prefix, raw)) == raw


@pytest.mark.parametrize(
    "text",
    ["", "esc_", "esc_" + "0" * 31, "esc_" + "0" * 33, "ESC_" + "0" * 32, "esc_" + "A" * 32,
     "jr_" + "0" * 32, "esc_esc_" + "0" * 32, "esc_" + "0" * 31 + "\n", None, 1, b"esc_", True],
)  # fmt: skip
def test_junk_is_no_id(text: object) -> None:
    """Another prefix, case, length or type is refused."""
    with pytest.raises(Malformed):
        ids.parse_id(ids.ESCROW, text)


def test_an_id_needs_sixteen_bytes() -> None:
    """Fewer bytes make no id."""
    with pytest.raises(Malformed):
        ids.format_id(ids.ESCROW, b"short")

"""Amounts: whole units inside, exact texts outside."""

import contextlib
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x402mw.core import amounts
from x402mw.core.amounts import AMOUNT_MAX, USDC, Asset
from x402mw.core.errors import AmountInvalid

JUNK = [
    "", " ", "-1", "+", "0x10", "1,0", "1_000", "\uff11", "\u0661", "NaN", "sNaN", "Infinity",
    "-Infinity", "1e999999999", "1e-999999999", "1e61", "1e-61", "0." + "0" * 30 + "1",
    "1" * 41, "1 ", " 1",
    "1\n", "\t1", "--1", "1e", "e1", ".", "1..2", None, True, 1, 1.5, Decimal(1), b"1", [], {},
    "9223372036854.775808", "1e30", "\ud800", "\x00", "1\x00", "0b1", "1/2", "\u00bd",
]  # fmt: skip
ATOMIC_JUNK = ["00", "01", "1.0", "1e3", "-0", "+1", "9" * 19, "1" * 20, "9223372036854775808"]


@pytest.mark.parametrize("text", JUNK)
def test_junk_is_no_display_amount(text: object) -> None:
    """Whatever is no plain, finite, non-negative number of units is refused by type."""
    with pytest.raises(AmountInvalid):
        amounts.to_atomic(text)


@pytest.mark.parametrize("text", [*JUNK, *ATOMIC_JUNK])
def test_junk_is_no_atomic_amount(text: object) -> None:
    """An atomic amount is ASCII digits below 2^63 without leading zeros, and a string."""
    with pytest.raises(AmountInvalid):
        amounts.parse_atomic(text)


@pytest.mark.parametrize("value", [10**61, -(10**61), Decimal("1e61"), Decimal("7" * 100_000)])
def test_a_number_of_many_digits_is_refused_before_it_is_expanded(value: Decimal | int) -> None:
    """M3: a JSON number may have any length, and to expand a million digits takes a minute."""
    with pytest.raises(AmountInvalid):
        amounts.parse_number(value)


@given(st.text(max_size=45))
def test_any_text_is_an_amount_or_refused(text: str) -> None:
    """No text whatever raises anything but `AmountInvalid`."""
    for read in (amounts.to_atomic, amounts.to_atomic_floor, amounts.parse_atomic):
        with contextlib.suppress(AmountInvalid):
            assert 0 <= read(text) <= AMOUNT_MAX


@pytest.mark.parametrize("value", [-1, AMOUNT_MAX + 1, True, "1", 1.0, None])
def test_an_integer_out_of_range_is_refused(value: int) -> None:
    """An amount is an integer between 0 and 2^63 - 1, and a boolean is none."""
    with pytest.raises(AmountInvalid):
        amounts.atomic(value)


@given(st.integers(0, AMOUNT_MAX))
def test_both_texts_read_back(value: int) -> None:
    """Every amount survives both of its texts."""
    assert amounts.parse_atomic(str(value)) == value
    assert amounts.to_atomic(amounts.display(value)) == value


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.00"), (1, "0.000001"), (10_000_000, "10.00"), (1_500_000, "1.50"), (-5, "-0.000005")],
)
def test_display_has_two_digits_or_what_it_needs(value: int, text: str) -> None:
    """Display texts have at least two fraction digits and no more than needed."""
    assert amounts.display(value) == text


def test_an_asset_without_decimals_is_shown_whole() -> None:
    """An asset that does not divide still shows two digits."""
    assert amounts.display(12, Asset("POINT", 0)) == "12.00"


@pytest.mark.parametrize(
    ("text", "value"),
    [("8.4e-05", 84), ("1E2", 100_000_000), ("-0", 0), ("+1", 1_000_000), (".5", 500_000)],
)
def test_spellings_in_the_wild_are_read(text: str, value: int) -> None:
    """Exponents and bare points, as clients send them, have their exact meaning."""
    assert amounts.to_atomic(text) == value


def test_finer_than_the_asset_is_refused_or_floored() -> None:
    """A new lock must be whole units; a cumulative total keeps its whole units."""
    with pytest.raises(AmountInvalid):
        amounts.to_atomic("0.0000137")
    assert amounts.to_atomic_floor("0.0000137") == 13


def test_thirty_digits_are_exact() -> None:
    """Thirty fraction digits are read without loss."""
    assert amounts.parse_display("0." + "0" * 29 + "1") == Fraction(1, 10**30)


def test_a_long_precise_number_is_refused() -> None:
    """A decimal whose expansion is too fine is refused however it came to be."""
    with pytest.raises(AmountInvalid):
        amounts.exact(Decimal((0, (1,), -31)))
    assert USDC.unit == 1_000_000


@pytest.mark.parametrize("value", [0, 1, Decimal("3.7"), Decimal("0.0000137"), Decimal("8E-5")])
def test_json_numbers_are_read_digit_by_digit(value: int | Decimal) -> None:
    """M3: a JSON number is as exact as the same digits in a string."""
    assert amounts.parse_number(value) == amounts.parse_display(str(value))


@pytest.mark.parametrize("value", [True, 1.5, "1", None, -1, Decimal("NaN"), Decimal("1E-31")])
def test_what_is_no_amount_is_no_number_either(value: object) -> None:
    """M1, M3: floats, booleans and texts are no JSON numbers; the bounds of texts hold."""
    with pytest.raises(AmountInvalid):
        amounts.parse_number(value)

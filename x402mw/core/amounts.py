"""Amounts of money: whole atomic units of one asset, and the texts they are written as.

Rules M1 to M5 of `docs/money.md`. Nothing here, or anywhere money is decided, is a float. Two texts
exist: *atomic* ("1000", inside x402 objects) and *display* ("0.001", on the escrow API and in code
that people write). Never mix them: one function reads each.
"""

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import NewType

from x402mw.core.errors import AmountInvalid

Atomic = NewType("Atomic", int)
"""Whole atomic units of one asset, `0 <= x <= AMOUNT_MAX`."""

AMOUNT_MAX = Atomic(2**63 - 1)
ZERO = Atomic(0)

DISPLAY_CHARACTERS_MAX = 40
FRACTION_DIGITS_MAX = 30
EXPONENT_MAX = 60
_ATOMIC_TEXT = re.compile(r"(?:0|[1-9][0-9]{0,18})", re.ASCII)
_DISPLAY_TEXT = re.compile(r"[!-^`-~]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Asset:
    """What amounts are counted in: its code on the wire and its decimal places (rule M5)."""

    code: str
    decimals: int

    @property
    def unit(self) -> int:
        """Atomic units in one display unit."""
        return int(10**self.decimals)


USDC = Asset("USDC", 6)


def atomic(value: int) -> Atomic:
    """Takes an integer as an amount, or raises `AmountInvalid` when it is out of range (M1)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise AmountInvalid(f"an amount is an integer of atomic units, not {type(value).__name__}")
    if not 0 <= value <= AMOUNT_MAX:
        raise AmountInvalid(f"an amount lies between 0 and {AMOUNT_MAX} atomic units")
    return Atomic(value)


def parse_atomic(text: object) -> Atomic:
    """Reads an atomic amount as x402 objects write it: ASCII digits, no sign, no leading zero."""
    if not isinstance(text, str) or not _ATOMIC_TEXT.fullmatch(text):
        raise AmountInvalid("an atomic amount is a string of digits without leading zeros")
    return atomic(int(text))


def parse_display(text: object) -> Fraction:
    """Reads a display amount exactly, however fine (M2, M4).

    Accepts what clients in the wild send, an exponent included ("8.4e-05"). Raises `AmountInvalid`
    for anything that is not a finite, non-negative ASCII number of at most 40 characters and 30
    fraction digits.
    """
    if not isinstance(text, str):
        raise AmountInvalid('an amount is a decimal string such as "10.00"')
    if len(text) > DISPLAY_CHARACTERS_MAX:
        raise AmountInvalid(f"an amount has at most {DISPLAY_CHARACTERS_MAX} characters")
    # Decimal also reads other scripts' digits, underscores and blanks; a payment API must not.
    if not _DISPLAY_TEXT.fullmatch(text):
        raise AmountInvalid('an amount is a decimal string such as "10.00"')
    try:
        value = Decimal(text)
    except InvalidOperation:
        raise AmountInvalid('an amount is a decimal string such as "10.00"') from None
    return exact(value)


def parse_number(value: object) -> Fraction:
    """Reads a display amount that came as a JSON number, never through float (M3)."""
    if isinstance(value, bool) or not isinstance(value, (int, Decimal)):
        raise AmountInvalid("an amount is a decimal string or a JSON number")
    return exact(Decimal(value))


def exact(value: Decimal) -> Fraction:
    """Turns a parsed number into an exact, non-negative fraction of display units (M2 to M4)."""
    if not value.is_finite():
        raise AmountInvalid("an amount is a finite number")
    exponent = value.as_tuple().exponent
    # An exponent of millions would cost gigabytes to expand; no amount of money needs 60 digits.
    if not isinstance(exponent, int) or abs(exponent) > EXPONENT_MAX:
        raise AmountInvalid(f"an amount has at most {FRACTION_DIGITS_MAX} fraction digits")
    # Nor does one need a million digits, which take a minute to expand.
    if value.adjusted() > EXPONENT_MAX:
        raise AmountInvalid(f"an amount is below 10^{EXPONENT_MAX}")
    fraction = Fraction(value)
    if value.is_signed() and fraction != 0:
        raise AmountInvalid("an amount is not negative")
    if (fraction * 10**FRACTION_DIGITS_MAX).denominator != 1:
        raise AmountInvalid(f"an amount has at most {FRACTION_DIGITS_MAX} fraction digits")
    return fraction


def to_atomic(text: object, asset: Asset = USDC) -> Atomic:
    """Reads a display amount that must be whole atomic units, as every new lock must be (M4)."""
    return whole(parse_display(text), asset)


def whole(value: Fraction, asset: Asset = USDC) -> Atomic:
    """Display units as atomic ones, which they must be exactly."""
    units = value * asset.unit
    if units.denominator != 1:
        raise AmountInvalid(f"{asset.code} has {asset.decimals} decimals; this amount is finer")
    return atomic(units.numerator)


def to_atomic_floor(text: object, asset: Asset = USDC) -> Atomic:
    """Reads a display amount and keeps its whole units: right for cumulative totals (M4)."""
    units = parse_display(text) * asset.unit
    return atomic(units.numerator // units.denominator)


def display(amount: int, asset: Asset = USDC) -> str:
    """Writes an amount in display units: at least two fraction digits and no more than needed."""
    whole, rest = divmod(abs(amount), asset.unit)
    digits = f"{rest:0{asset.decimals}d}" if asset.decimals else ""
    digits = digits.rstrip("0").ljust(2, "0")
    return f"{'-' if amount < 0 else ''}{whole}.{digits}"

"""Prices, as values: what a call may cost, and what it did cost.

Prices are rationals of atomic units and quantity; `rate` is the one rating function behind quotes,
charges, receipts and invoices, so they can never disagree (`docs/money.md`, M6).
"""

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final

from x402mw.core.amounts import AMOUNT_MAX, USDC, ZERO, Asset, Atomic, parse_display, to_atomic
from x402mw.core.errors import AmountInvalid, ConfigurationError
from x402mw.core.terms import Terms

_UNIT = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]{0,31}", re.ASCII)


class Free(Enum):
    """Marks a method that costs nothing although its neighbours do."""

    FREE = "free"


FREE: Final = Free.FREE


@dataclass(frozen=True, slots=True)
class PerCall:
    """One price for every call that succeeds, in display units: `PerCall("0.001")`."""

    price: str


@dataclass(frozen=True, slots=True)
class PerUnit:
    """A price for what the handler counts.

    `PerUnit("token", "0.002", per=1000, max_units=4000)` sells 1000 tokens for 0.002 and never more
    than 4000 of them in one call; `base` is paid by every successful call on top.
    """

    unit: str
    price: str
    per: int = 1
    max_units: int = 0
    base: str = "0"


Plan = PerCall | PerUnit


@dataclass(frozen=True, slots=True)
class Price:
    """A plan in atomic units: what goes into terms. Per-call prices have unit '' and zeros."""

    amount: Atomic
    unit: str = ""
    unit_price: int = 0
    per: int = 0
    base: Atomic = ZERO


def read_plan(plan: Plan, asset: Asset = USDC) -> Price:
    """Turns a plan into exact integers, or raises `ConfigurationError` saying what is wrong."""
    try:
        price = (
            Price(to_atomic(plan.price, asset))
            if isinstance(plan, PerCall)
            else _read_per_unit(plan, asset)
        )
    except AmountInvalid as error:
        raise ConfigurationError(f"{plan} has a price that is no amount: {error}") from None
    if price.amount == 0:
        raise ConfigurationError(f"{plan} costs nothing; mark what is free with FREE")
    return price


def _read_per_unit(plan: PerUnit, asset: Asset) -> Price:
    if not _UNIT.fullmatch(plan.unit):
        raise ConfigurationError(f"{plan}: a unit is a short name such as 'token'")
    for name in ("per", "max_units"):
        value = getattr(plan, name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= AMOUNT_MAX:
            raise ConfigurationError(f"{plan}: {name} is a whole number above 0")
    price = parse_display(plan.price) * asset.unit
    if price == 0:
        raise ConfigurationError(f"{plan} costs nothing per unit; use PerCall for a flat price")
    unit_price, per = price, plan.per
    # Finer prices than a unit are written over more quantity, in powers of ten (see protocol.md).
    while unit_price.denominator != 1:
        unit_price, per = unit_price * 10, per * 10
    base = to_atomic(plan.base, asset)
    most = base - (-plan.max_units * unit_price.numerator // per)
    if max(most, unit_price.numerator, per) > AMOUNT_MAX:
        raise ConfigurationError(f"{plan} can cost more than any session could hold")
    return Price(Atomic(most), plan.unit, unit_price.numerator, per, base)


def rate(unit_price: int, per: int, quantity: int) -> int:
    """What `quantity` units cost in all: the exact product, rounded down once."""
    return quantity * unit_price // per


def rate_call(terms: Terms, quantity_before: int, used: int) -> tuple[int, Atomic]:
    """Rates one successful call; returns the quantity billed and the charge.

    `quantity_before` is the session's total so far under these terms: the charge is the growth of
    the rounded total, so batching never changes a bill. Use beyond what the maximum pays for is not
    billed. The charge never exceeds `terms.amount`.
    """
    if used < 0:
        raise AmountInvalid("a quantity is not negative")
    if not terms.metered:
        return 0, terms.amount
    fits = (terms.amount - terms.base) * terms.per // terms.unit_price
    billed = min(used, fits)
    grown = rate(terms.unit_price, terms.per, quantity_before + billed)
    return billed, Atomic(terms.base + grown - rate(terms.unit_price, terms.per, quantity_before))

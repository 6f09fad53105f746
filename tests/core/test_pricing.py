"""Prices: exact quotes, and charges that batching cannot change."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.payments import METERED, QUOTE
from x402mw.core.amounts import Asset, Atomic
from x402mw.core.errors import AmountInvalid, ConfigurationError
from x402mw.core.pricing import FREE, PerCall, PerUnit, Price, rate, rate_call, read_plan
from x402mw.core.terms import Terms


@pytest.mark.parametrize(
    ("plan", "price"),
    [
        (PerCall("0.001"), Price(Atomic(1000))),
        (PerUnit("token", "0.002", per=1000, max_units=4000),
         Price(Atomic(8000), "token", 2000, 1000)),
        (PerUnit("row", "0.0000015", max_units=3), Price(Atomic(5), "row", 15, 10)),
        (PerUnit("byte", "0.000000000001", max_units=1), Price(Atomic(1), "byte", 1, 10**6)),
        (PerUnit("s", "1", max_units=2, base="0.5"), Price(Atomic(2_500_000), "s", 10**6, 1,
                                                           Atomic(500_000))),
    ],
)  # fmt: skip
def test_plans_become_exact_integers(plan: PerCall | PerUnit, price: Price) -> None:
    """The maximum is base + ceil(max_units x price); fine prices are written over more units."""
    assert read_plan(plan) == price


def test_a_plan_is_read_in_its_asset() -> None:
    """Decimals are the asset's."""
    assert read_plan(PerCall("0.05"), Asset("CENT", 2)).amount == 5
    assert FREE.value == "free"


@pytest.mark.parametrize(
    "plan",
    [
        PerCall("0"), PerCall("-1"), PerCall("0.0000001"), PerCall("1e30"), PerCall(""),
        PerCall(0.001), PerCall(None), PerCall("NaN"),
        PerUnit("", "1", max_units=1), PerUnit("a b", "1", max_units=1),
        PerUnit("x" * 33, "1", max_units=1), PerUnit("tokén", "1", max_units=1),
        PerUnit("t", "0", max_units=1), PerUnit("t", "1"), PerUnit("t", "1", max_units=-1),
        PerUnit("t", "1", max_units=True), PerUnit("t", "1", max_units=1.0),
        PerUnit("t", "1", max_units="1"), PerUnit("t", "1", per=0, max_units=1),
        PerUnit("t", "1", per=True, max_units=1), PerUnit("t", "1", max_units=2**62),
        PerUnit("t", "1", max_units=1, base="-1"), PerUnit("t", "1", max_units=1, base="1e-7"),
        PerUnit("t", "x", max_units=1), PerUnit("t", "1e-30", per=2**40, max_units=1),
    ],
)  # fmt: skip
def test_mistyped_prices_stop_the_start(plan: Any) -> None:
    """A price that is no price is a configuration error, never a charge."""
    with pytest.raises(ConfigurationError):
        read_plan(plan)


def metered(unit_price: int, per: int, base: int, max_units: int) -> Terms:
    """Terms of such a price."""
    most = base + -(-max_units * unit_price // per)
    return replace(METERED, unit_price=unit_price, per=per, base=Atomic(base), amount=Atomic(most))


PRICES = st.builds(
    metered,
    st.integers(1, 10**7),
    st.sampled_from([1, 10, 1000, 10**6]),
    st.integers(0, 10**6),
    st.integers(1, 10**6),
)


@given(PRICES, st.lists(st.integers(0, 2 * 10**6), max_size=30))
def test_splitting_never_changes_a_bill(terms: Terms, uses: list[int]) -> None:
    """However a quantity is cut into calls, the sum is the bases and one rounded product."""
    total = charged = 0
    for used in uses:
        billed, charge = rate_call(terms, total, used)
        assert 0 <= billed <= used
        assert terms.base <= charge <= terms.amount
        total, charged = total + billed, charged + charge
    whole = rate(terms.unit_price, terms.per, total)
    assert charged == len(uses) * terms.base + whole


@given(PRICES, st.integers(0, 2**62), st.integers(0, 2**62))
def test_a_charge_never_exceeds_what_was_signed(terms: Terms, before: int, used: int) -> None:
    """No history and no use make a call cost more than its maximum."""
    _, charge = rate_call(terms, before, used)
    assert terms.base <= charge <= terms.amount


@given(st.integers(0, 10**6))
def test_all_units_of_the_maximum_are_billed(used: int) -> None:
    """Use up to the maximum is billed to the unit."""
    terms = metered(3, 1000, 0, 10**6)
    assert rate_call(terms, 0, used) == (used, rate(3, 1000, used))


def test_check_values() -> None:
    """Figures worked out by hand."""
    assert rate_call(QUOTE, 0, 0) == (0, 1000)
    assert rate_call(METERED, 0, 0) == (0, 100)
    assert rate_call(METERED, 0, 1500) == (1500, 3100)
    assert rate_call(METERED, 0, 9999) == (4000, 8100)
    fine = metered(15, 10, 0, 3)
    assert [rate_call(fine, before, 1)[1] for before in (0, 1, 2, 3)] == [1, 2, 1, 2]


def test_a_negative_use_is_refused() -> None:
    """No handler can lower a bill by counting backwards."""
    with pytest.raises(AmountInvalid):
        rate_call(METERED, 10, -1)

"""The handler's meter: what may be counted, and until when."""

from dataclasses import replace

import pytest

from tests.support.payments import METERED, QUOTE
from x402mw.core.errors import AlreadySettled, WrongUnit
from x402mw.core.terms import Terms
from x402mw.provider.meter import Payment


def payment(terms: Terms = METERED) -> Payment:
    return Payment(terms, payer="ag_x", session="esc_x")


def test_calls_add_up():
    """Several calls of charge() add up, in the unit or its plural."""
    meter = payment()
    meter.charge(tokens=500)
    meter.charge(token=12)
    assert meter.used == 512


@pytest.mark.parametrize("quantities", [{"words": 1}, {"Tokens": 1}, {"tokens": 1, "rows": 2}])
def test_another_unit_is_refused_whole(quantities):
    """A keyword that is not the unit of the price is an error at once, and counts nothing."""
    meter = payment()
    with pytest.raises(WrongUnit):
        meter.charge(**quantities)
    assert meter.used == 0


@pytest.mark.parametrize("quantity", [-1, 1.0, True, "5", None])
def test_only_whole_numbers_count(quantity):
    """A quantity is a whole number of 0 or more."""
    meter = payment()
    with pytest.raises(WrongUnit):
        meter.charge(tokens=quantity)
    assert meter.used == 0


def test_a_price_per_call_has_no_unit():
    """A route with one price per call has nothing to count, and says so."""
    with pytest.raises(WrongUnit, match="one price per call"):
        payment(QUOTE).charge(calls=1)


def test_after_the_end_nothing_counts():
    """Once the figure has gone to the buyer, charge() raises AlreadySettled."""
    meter = payment()
    meter.charge(tokens=1)
    meter.settled()
    with pytest.raises(AlreadySettled):
        meter.charge(tokens=1)
    assert meter.used == 1


def test_it_shows_amounts_and_no_ids():
    """Ids of buyers stay out of logs."""
    assert repr(payment()) == "Payment(used=0, maximum=0.0081)"


@pytest.mark.parametrize(("unit", "plural"), [("query", "queries"), ("row", "rows")])
def test_plurals(unit, plural):
    """The plural of a unit is its keyword too."""
    meter = payment(replace(METERED, unit=unit))
    meter.charge(**{unit: 1, plural: 2})
    assert meter.used == 3

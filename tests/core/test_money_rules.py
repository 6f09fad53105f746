"""One test for each of the rules M1 to M6 of `docs/money.md`."""

import ast
from fractions import Fraction
from pathlib import Path

import pytest

from tests.support.payments import METERED, QUOTE
from x402mw.core import amounts, pricing, sessions, strict, terms
from x402mw.core.errors import AmountInvalid, Malformed
from x402mw.core.messages import EscrowExtra, PaymentRequirements, validate

CORE = Path(amounts.__file__).parent


@pytest.mark.parametrize("path", sorted(CORE.glob("*.py")), ids=lambda path: path.name)
def test_m1_no_float_in_the_core(path: Path) -> None:
    """M1: money code holds no float literal, no `float(`, and divides only whole numbers."""
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.Constant) and isinstance(node.value, float))
        assert not (isinstance(node, ast.Call) and ast.unparse(node.func) == "float")
        assert not isinstance(node, ast.Div)


def test_m1_amounts_fit_a_database_integer() -> None:
    """M1: an amount lies between 0 and 2^63 - 1."""
    assert amounts.atomic(2**63 - 1) == amounts.AMOUNT_MAX
    with pytest.raises(AmountInvalid):
        amounts.atomic(2**63)


def test_m2_display_outside_atomic_inside() -> None:
    """M2: the escrow API reads and writes display texts, x402 objects atomic ones."""
    assert amounts.display(amounts.to_atomic("10")) == "10.00"
    assert amounts.to_atomic_floor("8.400000000000001e-05") == 84
    with pytest.raises(AmountInvalid):
        amounts.parse_atomic("10.00")
    with pytest.raises(AmountInvalid):
        amounts.to_atomic("0" * 41)


def test_m3_json_numbers_are_exact() -> None:
    """M3: a JSON number with a point is a decimal, never a float."""
    value = strict.loads(b"0.1")
    assert amounts.exact(value) == Fraction(1, 10)


def test_m4_finer_amounts_keep_their_whole_units() -> None:
    """M4: totals floor, exact parts add up, and a new lock must be whole."""
    parts = [amounts.parse_display(text) for text in ("0.0000137", "0.009000000000000001")]
    assert (sum(parts) * 10**6).__floor__() == 9013
    assert amounts.to_atomic_floor("0.0000137") == 13
    with pytest.raises(AmountInvalid):
        amounts.to_atomic("0.0000137")
    with pytest.raises(AmountInvalid):
        amounts.to_atomic_floor("0." + "1" * 31)


def test_m5_an_asset_is_part_of_the_terms() -> None:
    """M5: the same figure in another asset is other terms."""
    accepts = terms.write_requirements(QUOTE, escrow="x", suggested_deposit=amounts.ZERO)
    requirements = validate(PaymentRequirements, accepts | {"asset": "EURC"})
    with pytest.raises(Malformed):
        terms.read_terms(requirements, validate(EscrowExtra, requirements.extra), QUOTE.network_id)


def test_m6_a_session_pays_the_rounded_total() -> None:
    """M6: 3,000 calls of one token cost what one call of 3,000 tokens costs."""
    charged = sum(pricing.rate_call(METERED, done, 1)[1] - METERED.base for done in range(3000))
    assert charged == pricing.rate_call(METERED, 0, 3000)[1] - METERED.base == 6000
    with pytest.raises(sessions.NotCovered):
        sessions.admit(
            sessions.Account(),
            cumulative=amounts.ZERO,
            amount=METERED.amount,
            deposit=amounts.AMOUNT_MAX,
        )

"""The tree of errors: stable codes, and whether money may have moved."""

import pytest

from x402mw.core import errors, gate, sessions
from x402mw.core.errors import Moved


def all_errors(root: type[errors.X402mwError]) -> list[type[errors.X402mwError]]:
    """Every class below the root."""
    return [root, *(leaf for child in root.__subclasses__() for leaf in all_errors(child))]


def test_every_error_has_its_own_code() -> None:
    """A program decides by code, so no two errors of the core share one."""
    known = [kind for kind in all_errors(errors.X402mwError) if ".core." in kind.__module__]
    codes = [kind.code for kind in known]
    assert len(set(codes)) == len(codes) > 15
    assert gate.Refused in known
    assert sessions.NotCovered in known


@pytest.mark.parametrize(
    ("error", "moved"),
    [
        (errors.LimitExceeded("total", "too much"), Moved.NO),
        (errors.PaymentRefused("no", reason="cover"), Moved.NO),
        (errors.EscrowRefused("no", reason="funds", status=409), Moved.NO),
        (errors.EscrowUnavailable("gone"), Moved.MAYBE),
        (errors.PaymentOutcomeUnknown("lost", handle=1), Moved.MAYBE),
        (errors.PaidOutcomeGone("gone", charge=3), Moved.YES),
    ],
)
def test_an_error_says_whether_money_moved(error: errors.X402mwError, moved: Moved) -> None:
    """Whoever catches an error can tell whether the payment may have been taken."""
    assert error.moved is moved
    assert str(error)


def test_errors_carry_what_a_program_needs() -> None:
    """The machine fields are attributes, not text."""
    assert errors.LimitExceeded("total", "x").limit == "total"
    assert errors.PaidOutcomeGone("x", charge=3).charge == 3
    assert errors.PaymentOutcomeUnknown("x").handle is None
    refused = errors.EscrowRefused("x", reason="funds", status=409, problem={"left": "1"})
    assert (refused.reason, refused.status, refused.problem) == ("funds", 409, {"left": "1"})
    assert errors.PaymentRefused("x").reason == ""

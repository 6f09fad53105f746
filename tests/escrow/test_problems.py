"""The catalogue of problems: complete, without dead entries, and the same in the documentation."""

import ast
from pathlib import Path

from x402mw.escrow.errors import Refused
from x402mw.escrow.problems import PROBLEMS, table

ROOT = Path(__file__).parents[2]
RAISED_AS = {"Refused": 1, "BadItem": 0}
"""Which argument of these calls is the code."""


def raised() -> set[tuple[int | None, str]]:
    """Status (None for a verdict) and code of every refusal that the escrow's sources spell out."""
    found: set[tuple[int | None, str]] = set()
    for path in (ROOT / "x402mw" / "escrow").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            place = RAISED_AS.get(node.func.id)
            if place is None or not isinstance(code := node.args[place], ast.Constant):
                continue
            status = node.args[0].value if place and isinstance(node.args[0], ast.Constant) else 422
            found.add((status, str(code.value)))
    return found


ELSEWHERE = {(404, "not_found"), (405, "method_not_allowed")}
"""What the router refuses."""


def test_every_refusal_is_in_the_catalogue() -> None:
    """Contract: every code that is raised has its meaning, its advice and its statuses."""
    missing = {
        (status, code)
        for status, code in raised()
        if code not in PROBLEMS or status not in PROBLEMS[code].statuses
    }
    assert missing == set()


def test_every_problem_can_happen() -> None:
    """Contract: the catalogue promises nothing that no source raises."""
    said = {(status, code) for code, problem in PROBLEMS.items() for status in problem.statuses}
    assert said - raised() - ELSEWHERE == set()


def test_a_problem_says_what_to_do_now() -> None:
    """RFC 9457: type, title, status and detail; and our code and advice beside them."""
    problem = Refused(409, "insufficient_funds", "too little", balance="1.00").problem()
    assert problem == {
        "type": "urn:x402mw:problem:insufficient_funds",
        "code": "insufficient_funds",
        "title": "Insufficient funds",
        "status": 409,
        "detail": "too little",
        "advice": "deposit, then send it again with a fresh idempotency key",
        "balance": "1.00",
    }


def test_stored_refusals_ask_for_a_fresh_key() -> None:
    """Rule 8: a refusal is replayed for its key, so what may pass later needs another key."""
    for code in ("faucet_limit", "invalid_state", "too_many_webhooks", "waits_its_turn"):
        assert "with a fresh idempotency key" in PROBLEMS[code].advice


def test_the_documentation_shows_the_same_table() -> None:
    """Documentation: `docs/escrow.md` has the table as `problems.table()` writes it."""
    assert table() in (ROOT / "docs" / "escrow.md").read_text()

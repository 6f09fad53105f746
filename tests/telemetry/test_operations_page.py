"""The operator's page and the code name the same events and the same figures."""

import ast
import re
from pathlib import Path

from x402mw.core import telemetry

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text()
LOGS = re.compile(r"_?log\.(debug|info|warning|error|exception|log)")
TOLD = re.compile(r'(?:logging\.\w+|level|"event":|_locked\(),? ?"(\w+)"(?!:)')


def events_of_the_code() -> set[str]:
    """Every word that stands where an event stands."""
    found: set[str] = set()
    for folder in ("x402mw", "client"):
        for path in (ROOT / folder).rglob("*.py"):
            found |= set(TOLD.findall(path.read_text()))
    return found


def test_every_event_is_documented_and_every_documented_event_exists() -> None:
    """What an operator reads about happens, and what happens can be read about."""
    rows = re.findall(r"^\| (`[^|]+) \| [^|]+ \| [^|]+ \|$", PAGE, re.MULTILINE)
    documented = {event for row in rows for event in re.findall(r"`(\w+)`", row)}
    assert len(events_of_the_code()) > 35
    assert events_of_the_code() == documented


def test_every_record_has_an_event() -> None:
    """No record of ours is written without the fields by which programs read it."""
    for folder in ("x402mw", "client"):
        for path in (ROOT / folder).rglob("*.py"):
            for call in ast.walk(ast.parse(path.read_text())):
                if isinstance(call, ast.Call) and LOGS.fullmatch(ast.unparse(call.func)):
                    assert "extra" in {one.arg for one in call.keywords}, f"{path}:{call.lineno}"


def test_every_figure_is_documented_and_every_documented_figure_exists() -> None:
    """The same for measures."""
    measures = {
        value.name for value in vars(telemetry).values() if isinstance(value, telemetry.Measure)
    }
    assert set(re.findall(r"^\| `(x402mw[\w.]+)` ", PAGE, re.MULTILINE)) == measures

"""Log records as JSON: one object a line, whatever is in the record."""

import json
import logging
import sys
from typing import Any

from x402mw.telemetry.logs import JsonFormatter


def line(message: str, *args: Any, exc_info: Any = None, **extra: Any) -> dict[str, Any]:
    """What the formatter makes of a record."""
    logger = logging.getLogger("x402mw.test")
    record = logger.makeRecord(
        logger.name, logging.INFO, "file", 1, message, args, exc_info, None, extra or None
    )
    record.created = 1_800_000_000.25
    text = JsonFormatter().format(record)
    assert text.isascii()
    assert "\n" not in text
    found: dict[str, Any] = json.loads(text)
    return found


def test_a_record_with_its_fields():
    """Time in UTC, level, logger, the whole sentence, and the fields as they are."""
    assert line("charged %s for %d", "0.001", 3, event="charged", amount=1000, final=True) == {
        "time": "2027-01-15T08:00:00.250+00:00",
        "level": "info",
        "logger": "x402mw.test",
        "message": "charged 0.001 for 3",
        "event": "charged",
        "amount": 1000,
        "final": True,
    }


def test_odd_values_and_line_breaks():
    """No field can break the line or the JSON; money beyond 2^53 keeps every digit."""
    found = line("a\nb\u2028 \x00 é", odd={1}, money=2**62, none=None, level="x")
    assert found["message"] == "a\nb\u2028 \x00 é"
    assert found["odd"] == "{1}"
    assert found["money"] == 2**62
    assert found["none"] is None
    assert found["level"] == "info"


def test_an_exception_is_a_field():
    """A traceback stands in one field, so that it stays with its record."""
    try:
        raise ValueError("wrong")
    except ValueError:
        found = line("failed", exc_info=sys.exc_info())
    assert found["exception"].endswith("ValueError: wrong")

"""Chooses, among many inputs, few that together reach all that any of them reaches."""

import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

WATCHED = ("x402mw/", "x402mw_client/")
Arc = tuple[str, int, int]


def reduce(check: Callable[[bytes], None], inputs: Iterable[bytes], bytes_max: int) -> list[bytes]:
    """The inputs that reach a step from line to line which no shorter one reached."""
    known: set[Arc] = set()
    kept: list[bytes] = []
    for data in sorted(set(inputs), key=lambda one: (len(one), one)):
        arcs = arcs_of(check, data)
        if not arcs <= known and len(data) <= bytes_max:
            known |= arcs
            kept.append(data)
            bytes_max -= len(data)
    return kept


def arcs_of(check: Callable[[bytes], None], data: bytes) -> set[Arc]:
    """The steps from line to line that one input causes in our own code."""
    found: set[Arc] = set()
    last: dict[FrameType, int] = {}

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        name = frame.f_code.co_filename
        if "tests/" in name or not any(part in name for part in WATCHED):
            return None
        if event in ("line", "return", "exception"):
            line = frame.f_lineno if event == "line" else -frame.f_lineno
            found.add((name, last.get(frame, 0), line))
            last[frame] = frame.f_lineno
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        check(data)
    finally:
        sys.settrace(before)
    return found

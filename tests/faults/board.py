"""A few integers in memory that a lane and all its processes share, also across their deaths.

The lane arms failpoints here and moves clocks; the processes count here what they passed. Whoever
is killed leaves its counts behind, so the lane always knows whether a fault has fired.
"""

import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

ROLES = ("buyer", "provider", "escrow")
SIDES = ("before", "after")
CELLS = 1024
_CLOCKS, _SETTLING, _GONE, _DEARER, _ARMED, _HITS = 0, 3, 4, 5, 8, 256
_SLOTS, _WIDTH = 8, 8
_POINT, _SIDE, _NTH, _ACTION, _SEEN, _FIRED = range(6)


class Action(IntEnum):
    """What a process does to itself at a failpoint."""

    KILL = 1
    STALL = 2
    ERROR = 3


@dataclass(frozen=True, slots=True)
class Armed:
    """A failpoint (its number and side) that fires once, when it is passed for the `nth` time."""

    point: int
    side: int
    nth: int
    action: Action


class Board:
    """Shared memory; make it before any process is forked."""

    def __init__(self) -> None:
        self._cells = memoryview(mmap.mmap(-1, CELLS * 8)).cast("q")

    def clear(self) -> None:
        """Forgets everything: a new schedule begins."""
        for cell in range(CELLS):
            self._cells[cell] = 0

    # Clocks.

    def clock(self, role: str) -> Callable[[], float]:
        """The clock of one role: the real time and an offset that the lane may change."""
        cells, cell = self._cells, _CLOCKS + ROLES.index(role)
        return lambda: time.time() + cells[cell] / 1000

    def shift(self, role: str, seconds: float) -> None:
        """Moves a role's clock on by so much, or back."""
        self._cells[_CLOCKS + ROLES.index(role)] += int(seconds * 1000)

    def set_right(self) -> None:
        """Gives every role the right time."""
        for cell in range(len(ROLES)):
            self._cells[_CLOCKS + cell] = 0

    # Phases.

    @property
    def settling(self) -> bool:
        """Whether the faults are over, and everyone shall come to an end."""
        return bool(self._cells[_SETTLING])

    @settling.setter
    def settling(self, value: bool) -> None:
        self._cells[_SETTLING] = int(value)

    @property
    def provider_gone(self) -> bool:
        """Whether the buyer is to find no provider any more."""
        return bool(self._cells[_GONE])

    @provider_gone.setter
    def provider_gone(self, value: bool) -> None:
        self._cells[_GONE] = int(value)

    @property
    def dearer(self) -> bool:
        """Whether a provider that starts now starts with higher prices."""
        return bool(self._cells[_DEARER])

    @dearer.setter
    def dearer(self, value: bool) -> None:
        self._cells[_DEARER] = int(value)

    # Failpoints.

    def arm(self, slot: int, armed: Armed) -> None:
        """Arms a failpoint from now on; its passes are counted from here."""
        at = _ARMED + slot * _WIDTH
        self._cells[at + _SEEN] = self._cells[at + _FIRED] = 0
        self._cells[at + _SIDE], self._cells[at + _NTH] = armed.side, armed.nth
        self._cells[at + _ACTION] = armed.action
        self._cells[at + _POINT] = armed.point + 1

    def disarm(self) -> None:
        """Lets nothing fire any more; what has fired stays noted."""
        for slot in range(_SLOTS):
            self._cells[_ARMED + slot * _WIDTH] = 0

    def fired(self, slot: int) -> bool:
        """Whether the failpoint in a slot has fired."""
        return bool(self._cells[_ARMED + slot * _WIDTH + _FIRED])

    def passed(self, point: int, side: int) -> Action | None:
        """Counts a pass; returns what the process has to do to itself now, if anything."""
        cells = self._cells
        cells[_HITS + 2 * point + side] += 1
        for at in range(_ARMED, _ARMED + _SLOTS * _WIDTH, _WIDTH):
            if cells[at] == point + 1 and cells[at + _SIDE] == side and not cells[at + _FIRED]:
                cells[at + _SEEN] += 1
                if cells[at + _SEEN] >= cells[at + _NTH]:
                    cells[at + _FIRED] = 1
                    return Action(cells[at + _ACTION])
        return None

    def hits(self, point: int, side: int) -> int:
        """How often a failpoint was passed."""
        return self._cells[_HITS + 2 * point + side]

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


class _Flag:
    """A cell of the board that says yes or no."""

    def __init__(self, cell: int) -> None:
        self._cell = cell

    def __get__(self, board: "Board", _kind: type["Board"]) -> bool:
        return bool(board.cells[self._cell])

    def __set__(self, board: "Board", value: bool) -> None:
        board.cells[self._cell] = int(value)


class Board:
    """Shared memory; make it before any process is forked."""

    def __init__(self) -> None:
        self.cells = memoryview(mmap.mmap(-1, CELLS * 8)).cast("q")

    def clear(self) -> None:
        """Forgets everything: a new schedule begins."""
        for cell in range(CELLS):
            self.cells[cell] = 0

    # Clocks.

    def clock(self, role: str) -> Callable[[], float]:
        """The clock of one role: the real time and an offset that the lane may change."""
        cells, cell = self.cells, _CLOCKS + ROLES.index(role)
        return lambda: time.time() + cells[cell] / 1000

    def shift(self, role: str, seconds: float) -> None:
        """Moves a role's clock on by so much, or back."""
        self.cells[_CLOCKS + ROLES.index(role)] += int(seconds * 1000)

    def set_right(self) -> None:
        """Gives every role the right time."""
        for cell in range(len(ROLES)):
            self.cells[_CLOCKS + cell] = 0

    # Phases.

    settling = _Flag(_SETTLING)
    """Whether the faults are over, and everyone shall come to an end."""
    provider_gone = _Flag(_GONE)
    """Whether the buyer is to find no provider any more."""
    dearer = _Flag(_DEARER)
    """Whether a provider that starts now starts with higher prices."""

    # Failpoints.

    def arm(self, slot: int, armed: Armed) -> None:
        """Arms a failpoint from now on; its passes are counted from here."""
        at = _ARMED + slot * _WIDTH
        self.cells[at + _SEEN] = self.cells[at + _FIRED] = 0
        self.cells[at + _SIDE], self.cells[at + _NTH] = armed.side, armed.nth
        self.cells[at + _ACTION] = armed.action
        self.cells[at + _POINT] = armed.point + 1

    def disarm(self) -> None:
        """Lets nothing fire any more; what has fired stays noted."""
        for slot in range(_SLOTS):
            self.cells[_ARMED + slot * _WIDTH] = 0

    def fired(self, slot: int) -> bool:
        """Whether the failpoint in a slot has fired."""
        return bool(self.cells[_ARMED + slot * _WIDTH + _FIRED])

    def passed(self, point: int, side: int) -> Action | None:
        """Counts a pass; returns what the process has to do to itself now, if anything."""
        cells = self.cells
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
        return self.cells[_HITS + 2 * point + side]

"""Clocks that are wrong."""

from collections.abc import Callable

EPOCH = 1_800_000_000.0


class Clock:
    """One party's clock, in seconds since the epoch; `rate` 1.0 is right."""

    def __init__(self, moment: Callable[[], float], *, offset: float = 0.0, rate: float = 1.0):
        self._moment, self.offset, self.rate = moment, offset, rate

    def __call__(self) -> float:
        """What it shows now."""
        return EPOCH + self._moment() * self.rate + self.offset

"""The turn to write: one at a time, nobody twice before the next one, never waiting for ever."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from x402mw.provider.journal.lock import FileLock
from x402mw.provider.journal.turn import SLIP_PAST_SECONDS, Turn


@pytest.fixture
def turns(tmp_path: Path) -> Iterator[list[Turn]]:
    """The turns of three workers."""
    found = [Turn(tmp_path) for _ in range(3)]
    yield found
    for turn in found:
        turn.close()


def test_one_has_it(turns: list[Turn]) -> None:
    """While one worker has the turn no other gets it, and waiting for it ends in time."""
    first, second, _ = turns
    assert first.take(1)
    asked = time.monotonic()
    assert not second.take(0.05)
    assert time.monotonic() - asked < 1
    first.give()
    assert second.take(5)


def test_giving_up_holds_nobody_up(turns: list[Turn]) -> None:
    """A turn that comes after its worker has given up waiting is passed on at once."""
    first, second, third = turns
    assert first.take(1)
    assert not second.take(0.05)
    first.give()
    assert third.take(5)
    assert not second.take(0.05)
    third.give()
    assert second.take(5)


def test_whoever_waits_comes_first(turns: list[Turn]) -> None:
    """A worker that has just written cannot write again before one that was waiting."""
    first, second, _ = turns
    order: list[str] = []
    assert first.take(1)
    waiting = threading.Thread(target=lambda: (second.take(5), order.append("second")))
    waiting.start()
    # Nothing but its lock tells that the other one waits by now.
    while first._next.try_take():
        first._next.give()
        time.sleep(0.001)
    first.give()
    again = threading.Thread(target=lambda: (first.take(5), order.append("first")))
    again.start()
    waiting.join(5)
    second.give()
    again.join(5)
    assert order == ["second", "first"]


def test_a_stopped_one_in_front_is_passed(turns: list[Turn], tmp_path: Path) -> None:
    """If the next one does not take the free turn, because it was stopped, others go before it."""
    stopped = FileLock(str(tmp_path / "next"))
    assert stopped.try_take()
    asked = time.monotonic()
    assert turns[0].take(SLIP_PAST_SECONDS * 3)
    assert time.monotonic() - asked < SLIP_PAST_SECONDS * 2.5
    turns[0].give()
    stopped.close()
    assert turns[1].take(5)

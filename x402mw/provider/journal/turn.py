"""Whose turn it is to write: one batch at a time, of all workers of one host, and none starves.

SQLite's own waiting is a lottery: a worker polls, and others slip in between. Here a worker first
takes the place of the next one (`next`) and holds it until it has the turn (`turn`), so whoever has
just written cannot write again before the next one has. Both locks are waited for by the kernel.

Waiting is bounded. A worker that was stopped in the middle of a batch keeps the turn; the others
are told so in time, and refuse.
"""

import threading
import time
from pathlib import Path

from x402mw.provider.journal.lock import FileLock

SLIP_PAST_SECONDS = 0.5
"""After this long a stopped process may be the next one; then the turn is tried without."""
SLIP_PAST_EVERY_SECONDS = 0.002


class Turn:
    """The turn of one worker; `take` and `give` are for one thread."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds the lock files; all workers name the same one."""
        self._next, self._turn = (FileLock(str(folder / name)) for name in ("next", "turn"))
        self._mine: FileLock | None = None
        self._waiter = _Waiter(folder)

    def take(self, seconds: float) -> bool:
        """Takes the turn, waiting at most so long; tells whether it was had."""
        if self._take_free():
            self._mine = self._turn
        elif self._waiter.wait(min(seconds, SLIP_PAST_SECONDS)):
            self._mine = self._waiter.turn
        elif self._slip_past(seconds - SLIP_PAST_SECONDS):
            self._mine = self._turn
        return self._mine is not None

    def give(self) -> None:
        """Gives the turn up, if it is ours."""
        mine, self._mine = self._mine, None
        if mine is not None:
            mine.give()

    def close(self) -> None:
        """Gives everything up."""
        self.give()
        for lock in (self._next, self._turn):
            lock.close()
        self._waiter.close()

    def _take_free(self) -> bool:
        """Takes the turn if nobody has it and nobody waits."""
        if not self._next.try_take():
            return False
        try:
            return self._turn.try_take()
        finally:
            self._next.give()

    def _slip_past(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._turn.try_take():
                return True
            time.sleep(SLIP_PAST_EVERY_SECONDS)
        return False


class _Waiter:
    """A thread that waits in the kernel, which knows no time limit, for one that has a limit."""

    def __init__(self, folder: Path) -> None:
        self._next, self.turn = (FileLock(str(folder / name)) for name in ("next", "turn"))
        self._changed = threading.Condition()
        self._wanted = self._had = self._waiting = self._closed = False
        self._thread: threading.Thread | None = None

    def wait(self, seconds: float) -> bool:
        """Waits for the turn; without it in time, it will be given up when it comes."""
        with self._changed:
            self._start()
            self._wanted = True
            if not self._waiting:
                self._waiting = True
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._had, seconds)
            had, self._had, self._wanted = self._had, False, False
            return had

    def close(self) -> None:
        """Ends the thread, unless the kernel has it; then it ends with its wait or its process."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if not self._waiting:
            self._close_locks()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="x402mw-turn", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while self._asked():
            self._next.take()
            self.turn.take()
            self._next.give()
            with self._changed:
                self._waiting = False
                self._had = self._wanted
                if not self._wanted:
                    self.turn.give()
                self._changed.notify_all()
        self._close_locks()

    def _asked(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return not self._closed

    def _close_locks(self) -> None:
        self._next.close()
        self.turn.close()

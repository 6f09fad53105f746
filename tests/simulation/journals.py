"""The adapter to the provider's journal: its real operations and rules, without its thread.

Only this file knows how the journal is built inside. A batch is gathered, carried out and
committed by the journal's own code; the disk below it may be full, and the process may die right
before or right after a commit.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from tests.simulation.loop import HERE, Killed
from x402mw.provider.journal.writer import Writer

WORKER_ROUND_SECONDS = 40.0
"""How often a worker looks for others that died."""


@dataclass
class Disk:
    """One disk: `full` refuses every commit; `crash` kills whoever commits next."""

    full: bool = False
    crash: str = ""
    faults: int = 0

    def commit(self, commit: Callable[[], None]) -> None:
        """Commits, if the disk and the process live to see it."""
        if self.full:
            self.faults += 1
            raise sqlite3.OperationalError("database or disk is full")
        crash, self.crash = self.crash, ""
        if crash == "before":
            self._die()
        commit()
        if crash == "after":
            self._die()

    def _die(self) -> None:
        process = HERE.get()
        if process is not None:
            process.kill()
            raise Killed


def disk_here() -> Disk:
    """The disk of the process that is running."""
    process: Any = HERE.get()
    return process.disk if hasattr(process, "disk") else Disk()


class SimWriter(Writer):
    """A worker's writer on the simulated loop instead of a thread."""

    def open(self, open_store: Any) -> None:
        """Opens the store; there is no thread to start."""
        self._due = False
        store = self._store = open_store()
        process = HERE.get()
        if process is not None:
            process.at_death.append(store.close)
        commit = store.commit
        store.commit = lambda: disk_here().commit(commit)
        try:
            self._resume()
        except BaseException:
            store.close()
            raise
        self._look_after()

    def _look_after(self) -> None:
        asyncio.get_running_loop().call_later(WORKER_ROUND_SECONDS, self._look_after_now)

    def _look_after_now(self) -> None:
        if not self.stopped:
            self._round()
            self._look_after()

    def stop(self) -> None:
        """Commits what waits, settles what is still open, and leaves."""
        self.stopped = True
        self._flush()
        self._leave()
        self._store.close()

    def submit(self, *given: Any, **named: Any) -> Any:
        """Lets the operation wait for its batch."""
        future = super().submit(*given, **named)
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_later(0.001, self._flush)
        return future

    def _flush(self) -> None:
        self._due = False
        self._hand_all_over()
        while not self._jobs.empty():
            first = self._jobs.get()
            jobs = [] if first is None else [first]
            self._transact(jobs)
            if self.stopped:
                for job in jobs:
                    job.deliver()
            else:
                asyncio.get_running_loop().call_later(0.001, _deliver_all, jobs)


def _deliver_all(jobs: list[Any]) -> None:
    for job in jobs:
        job.deliver()


@contextmanager
def simulated_journals() -> Iterator[None]:
    """Gives every journal that is opened meanwhile the simulated writer."""
    with (
        mock.patch("x402mw.provider.journal.journal.Writer", SimWriter),
        mock.patch("x402mw.provider.journal.journal.atexit"),
    ):
        yield


# Files.


def copy_file(path: Path, copy: Path) -> None:
    """Backs a database up while it is in use."""
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)


def put_back(copy: Path, path: Path) -> None:
    """Restores a backup over a database that nobody uses now."""
    for end in ("-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)
    path.write_bytes(copy.read_bytes())


# What the oracle reads, past all of the journal's code.


@dataclass(frozen=True)
class Row:
    """One session in a journal."""

    id: bytes
    journal: bytes
    deposit: int
    best: int
    charged: int
    reserved: int
    state: str
    sent: int
    redeemed: int
    released: int
    ended: bool
    written_off: str | None


@dataclass(frozen=True)
class CallRow:
    """One call in a journal."""

    session: bytes
    seq: int
    amount: int
    state: str
    charge: int
    used: int
    terms: bytes


def read_journal(path: Path) -> tuple[dict[bytes, Row], list[CallRow]]:
    """Reads the sessions and calls of a journal file."""
    with closing(sqlite3.connect(path)) as connection:
        sessions = connection.execute(
            "SELECT id, journal, deposit, best, charged, reserved, state, sent, redeemed,"
            " released, ended, written_off FROM sessions"
        )
        rows = {row[0]: Row(*row) for row in sessions}
        calls = connection.execute(
            "SELECT session, seq, amount, state, charge, used, terms FROM calls"
        )
        return rows, [CallRow(*row) for row in calls]


def count_replaced(path: Path) -> int:
    """How many ids this journal has given up: each time it was found to be a restored backup."""
    with closing(sqlite3.connect(path)) as connection:
        query = "SELECT count(*) FROM journals WHERE replaced = 1"
        return int(connection.execute(query).fetchone()[0])

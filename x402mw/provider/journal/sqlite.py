"""The journal in one SQLite file, for any number of worker processes of one host.

Beside the file lies a folder of locks: whose turn it is to write, one lock for life per worker, and
one for the worker that redeems.
"""

import contextlib
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from x402mw.core.errors import ConfigurationError
from x402mw.provider.journal import rows
from x402mw.provider.journal.errors import JournalLocked
from x402mw.provider.journal.lock import FileLock
from x402mw.provider.journal.schema import open_database
from x402mw.provider.journal.store import Durability, RowRefused, StoreFailed, Table, Values
from x402mw.provider.journal.turn import Turn

TURN_SECONDS = 2.0
"""How long a batch waits for the other workers before it fails."""
START_SECONDS = 60.0
START_EVERY_SECONDS = 0.02
"""How long a worker waits for another one that is opening the file, and how often it looks."""
WORKERS_MAX = 256
ROWS_AT_ONCE = 64
"""Rows in one statement. Only powers of two are used, so that few statements are prepared."""


class SqliteStore:
    """One worker's connection to the file, and its locks (`store.Store`)."""

    def __init__(self, path: str, durability: Durability) -> None:
        """Opens or creates the file; blocks while another worker is just doing so.

        Raises `JournalLocked` if a process of an older version has it, `JournalCorrupt` if it is
        damaged, and `ConfigurationError` if it cannot be used.
        """
        self._path = path
        self._folder = Path(f"{path}-locks")
        self._seized: list[FileLock] = []
        self._version = self._version_before = 0
        with contextlib.ExitStack() as opened:
            try:
                self._open(opened, durability)
            except OSError as error:
                raise ConfigurationError(f"the journal {path} cannot be opened: {error}") from None
            self._opened = opened.pop_all()

    def _open(self, opened: contextlib.ExitStack, durability: Durability) -> None:
        self._share_with_own_kind(opened)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        starting = opened.enter_context(contextlib.closing(self._lock("starting")))
        _take_in_time(starting)
        self._turn = opened.enter_context(contextlib.closing(Turn(self._folder)))
        self._leading = opened.enter_context(contextlib.closing(self._lock("redeemer")))
        opened.callback(self.release)
        self.worker = self._take_worker(opened)
        self.alone = all(self.seize(worker) for worker in self._others())
        self.release()
        self.connection = open_database(self._path, durability, alone=self.alone)
        opened.callback(self.connection.close)
        starting.give()

    def _share_with_own_kind(self, opened: contextlib.ExitStack) -> None:
        """Keeps out older versions, which take this lock for one process alone."""
        lock = opened.enter_context(contextlib.closing(FileLock(f"{self._path}.lock")))
        if not lock.try_share():
            raise JournalLocked(f"the journal {self._path} is in use by an older version")

    def _take_worker(self, opened: contextlib.ExitStack) -> int:
        for worker in range(WORKERS_MAX):
            lock = self._lock(f"worker-{worker}")
            if lock.try_take():
                opened.callback(lock.close)
                return worker
            lock.close()
        raise ConfigurationError(f"the journal {self._path} has {WORKERS_MAX} workers already")

    def _others(self) -> list[int]:
        found = (int(path.name.removeprefix("worker-")) for path in self._folder.glob("worker-*"))
        return [worker for worker in found if worker != self.worker]

    def _lock(self, name: str) -> FileLock:
        return FileLock(str(self._folder / name))

    def close(self) -> None:
        """Closes the file, then gives up the locks; may be called again."""
        self._opened.close()

    # Batches.

    def begin(self) -> Values:
        """Waits for our turn, but not for ever: a worker may have been stopped in its own."""
        if not self._turn.take(TURN_SECONDS):
            raise StoreFailed("another worker does not end its turn")
        self.connection.execute("BEGIN IMMEDIATE")
        # It changes with what other connections commit, and with nothing else.
        self._version_before = self._version
        (self._version,) = self.connection.execute("PRAGMA data_version").fetchone()
        return self._totals()

    @property
    def undisturbed(self) -> bool:
        """Whether nobody has written since our last batch was committed."""
        return self._version == self._version_before

    def look(self) -> Values:
        """Begins a transaction that sees one moment of the file."""
        self.connection.execute("BEGIN")
        return self._totals()

    def _totals(self) -> Values:
        found: Values = self.connection.execute(rows.READ_TOTALS).fetchone()
        return found

    def commit(self) -> None:
        """Writes the batch to the disk."""
        self.connection.execute("COMMIT")

    def committed(self, ticket: str) -> bool:
        """Never asked: a commit of SQLite either happened or raised."""
        raise StoreFailed(f"there is no batch {ticket}")

    def end(self) -> None:
        """Takes back what was not committed, and ends our turn."""
        try:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
        finally:
            self._turn.give()

    # Rows.

    def select(self, statement: str, values: Values | Mapping[str, Any] = ()) -> list[Values]:
        """Runs one statement."""
        return self.connection.execute(_dialect(statement), values).fetchall()

    def read_rows(self, table: Table, keys: Sequence[Values]) -> Iterator[Values]:
        """Reads rows by their keys."""
        for some in _in_powers(keys):
            statement = _read(table, len(some))
            yield from self.connection.execute(statement, [*chain.from_iterable(some)])

    def write_rows(self, table: Table, values: Sequence[Values]) -> None:
        """Inserts or changes rows."""
        for some in _in_powers(values):
            statement = _write(table, len(some))
            self.connection.execute(statement, [*chain.from_iterable(some)])

    # The other workers.

    def seize(self, worker: int) -> bool:
        """Whether this worker is dead: nobody holds its lock."""
        lock = self._lock(f"worker-{worker}")
        if lock.try_take():
            self._seized.append(lock)
            return True
        lock.close()
        return False

    def release(self) -> None:
        """Gives up the locks of the dead."""
        while self._seized:
            self._seized.pop().close()

    def lead(self) -> bool:
        """Holds the redeemer's lock, or takes it."""
        return self._leading.try_take()

    def explain(self, error: Exception) -> Exception:
        """Tells a row that can never be written from a file that cannot be written now."""
        match error:
            case sqlite3.IntegrityError() | sqlite3.DataError() | OverflowError():
                return RowRefused(str(error))
            case sqlite3.DatabaseError() | OSError():
                return StoreFailed(str(error))
        return error


def _take_in_time(lock: FileLock) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not lock.try_take():
        if time.monotonic() >= deadline:
            raise ConfigurationError("another worker does not get on with opening this journal")
        time.sleep(START_EVERY_SECONDS)


@cache
def _dialect(statement: str) -> str:
    return statement.replace("greatest(", "max(")


@cache
def _read(table: Table, count: int) -> str:
    names = [f"column{number}" for number in range(1, len(table.key) + 1)]
    return table.join(f"(VALUES {_places(len(names), count)}) AS k", names)


@cache
def _write(table: Table, count: int) -> str:
    return table.insert(_places(len(table.columns), count))


def _places(width: int, count: int) -> str:
    return ", ".join([f"({', '.join('?' * width)})"] * count)


def _in_powers(values: Sequence[Values]) -> Iterator[Sequence[Values]]:
    """Cuts rows into pieces whose lengths are powers of two."""
    start, left = 0, len(values)
    while left:
        size = min(ROWS_AT_ONCE, 1 << left.bit_length() - 1)
        yield values[start : start + size]
        start, left = start + size, left - size

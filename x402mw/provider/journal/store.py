"""What the journal asks of a database: rows, one batch at a time, and who else is alive.

Everything is called from one thread. From `begin` until `commit` or `rollback` no other worker
writes, on whatever host it runs; that alone is what makes the operations above right.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Durability = Literal["fsync", "process"]
"""What an acknowledged write survives: loss of power, or only the death of the process."""

Values = tuple[Any, ...]


class RowRefused(Exception):
    """The database refuses a row: no integer of 64 bits, or against a check. Somebody's mistake."""


class StoreFailed(Exception):
    """The database cannot be used just now, and nothing of the batch was written."""


class Conflict(StoreFailed):
    """The database took the batch back for the sake of another one; it may be tried again."""


class CommitUnknown(StoreFailed):
    """Nobody told whether the batch was committed; `Store.committed(ticket)` will."""

    def __init__(self, message: str, ticket: str) -> None:
        super().__init__(message)
        self.ticket = ticket


_STORABLE = {int, str, bytes, type(None)}


def check_types(values: Iterable[Values]) -> None:
    """Raises `RowRefused` for what databases would round, each in its own way."""
    for row in values:
        if not _STORABLE.issuperset(map(type, row)):
            raise RowRefused("a row holds what is no integer, text or bytes")


@dataclass(frozen=True, slots=True)
class Table:
    """A table whose rows a transaction holds in memory, read by their `key`.

    Written rows are told apart by `identity`, one or several columns; a row which is there already
    takes over those that are `changing`.
    """

    name: str
    key: tuple[str, ...]
    columns: tuple[str, ...]
    changing: tuple[str, ...]
    identity: tuple[str, ...] = ("id",)

    def insert(self, values: str) -> str:
        """The statement that inserts or changes rows; `values` stand behind VALUES."""
        names, identity = ", ".join(self.columns), ", ".join(self.identity)
        changes = ", ".join(f"{name} = excluded.{name}" for name in self.changing)
        then = f"ON CONFLICT ({identity}) DO UPDATE SET {changes}" if changes else ""
        return f"INSERT INTO {self.name} ({names}) VALUES {values} {then}"  # noqa: S608 (no input)

    def join(self, keys: str, names: Sequence[str]) -> str:
        """The statement that reads the rows of keys; `keys` is a FROM item with these columns."""
        columns = ", ".join(f"t.{name}" for name in self.columns)
        both = zip(self.key, names, strict=True)
        same = " AND ".join(f"t.{column} = k.{name}" for column, name in both)
        # CROSS tells SQLite to go through the keys, not through the table.
        return f"SELECT {columns} FROM {keys} CROSS JOIN {self.name} AS t WHERE {same}"  # noqa: S608


class Store(Protocol):
    """One worker's connection to the journal's database.

    `worker` is the number by which it is known while it lives; no two living workers share one.
    `alone` tells whether no other worker was alive when it came.
    """

    worker: int
    alone: bool

    @property
    def undisturbed(self) -> bool:
        """Within a batch: whether nobody has written since our last one was committed."""

    def begin(self) -> Values:
        """Waits for our turn, begins a batch, and returns the row of `totals`."""

    def look(self) -> Values:
        """Begins a transaction that only reads, of one moment, and waits for nobody."""

    def commit(self) -> None:
        """Makes the batch durable; but for `CommitUnknown`, an error means that it is not."""

    def committed(self, ticket: str) -> bool:
        """What became of a batch of unknown outcome; raises `StoreFailed` while nobody can tell."""

    def end(self) -> None:
        """Takes back what was not committed, and ends our turn: after every `begin` or `look`."""

    def select(self, statement: str, values: Values | Mapping[str, Any] = ()) -> list[Values]:
        """Runs one statement of `rows`, and returns its rows."""

    def read_rows(self, table: Table, keys: Sequence[Values]) -> Iterable[Values]:
        """Reads the rows of these keys, in any order."""

    def write_rows(self, table: Table, rows: Sequence[Values]) -> None:
        """Inserts or changes rows of different keys."""

    def seize(self, worker: int) -> bool:
        """Whether this other worker is dead; then its number is ours too until `release`."""

    def release(self) -> None:
        """Gives up the numbers that were seized."""

    def lead(self) -> bool:
        """Whether we are the one worker that redeems; tries to become it if nobody is."""

    def explain(self, error: Exception) -> Exception:
        """What an error of this database means: `RowRefused`, `StoreFailed`, or what it is."""

    def close(self) -> None:
        """Gives everything up."""

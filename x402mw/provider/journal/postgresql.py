"""The journal in PostgreSQL, for workers on several hosts.

1. One batch at a time writes, across all hosts: each begins by locking the row of `totals`. Under
   READ COMMITTED every later statement then sees what was committed before: SQLite's own rules.
2. A worker lives as long as its second connection, which runs no batches and holds its number as an
   advisory lock. Connections also blink while a worker lives (a server restarts): a number counts
   as free only after it was seen so for a while, and a worker that comes back takes its own again.
3. Nothing waits for ever: not for the row's lock, not for a worker that was stopped in mid-batch,
   not for a server that is gone.
4. If the connection is lost over a COMMIT, the server is asked afterwards what became of it.
"""

import asyncio
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import asyncpg  # type: ignore[import-untyped]  # it has no stubs

from x402mw.core.errors import ConfigurationError
from x402mw.provider.journal import dialect, rows
from x402mw.provider.journal.connections import Line, Locks, schema_of
from x402mw.provider.journal.errors import JournalLocked
from x402mw.provider.journal.schema import MIGRATIONS, SCHEMA, SCHEMA_VERSION, migrate_from
from x402mw.provider.journal.store import (
    CommitUnknown,
    Conflict,
    Durability,
    RowRefused,
    StoreFailed,
    Table,
    Values,
)

WORKERS_MAX = 10_000
STARTING, LEADING = WORKERS_MAX, WORKERS_MAX + 1
START_SECONDS = 30.0
FREE_ROUNDS = 3
"""In so many of our rounds in a row a worker's number must be free before it counts as dead."""
VERSION_SETTING = "schema_version"
READ_VERSION = "SELECT value FROM settings WHERE key = $1"
WRITE_VERSION = f"INSERT INTO settings VALUES ('{VERSION_SETTING}', '{SCHEMA_VERSION}')"  # noqa: S608
CHANGE_VERSION = f"UPDATE settings SET value = '{SCHEMA_VERSION}' WHERE key = '{VERSION_SETTING}'"  # noqa: S608

LOCK_TOTALS = (
    rows.READ_TOTALS.replace(" FROM", ", pg_current_xact_id()::text, xmin::text::bigint FROM")
    + " FOR UPDATE"
)
XMIN_BITS = 32
"""A row knows who wrote it by so many of the lower bits of a transaction's number."""
TRIES = 3
LOST = (
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.OperatorInterventionError,
    OSError,
)
"""What is raised on a connection that is no more."""

T = TypeVar("T")


class PostgresqlStore:
    """One worker's two connections (`store.Store`)."""

    def __init__(self, url: str, durability: Durability) -> None:
        """Connects, and makes the tables if there are none.

        Raises `ConfigurationError` if the server cannot be reached or the journal not be used.
        """
        self.worker, self.alone = -1, False
        self._schema = schema_of(url)
        self._book, self._life = Line(url, durability, "book"), Line(url, durability, "life")
        self._locks = Locks(self._life, self._schema)
        self._leading = False
        self._seen_free: Counter[int] = Counter()
        self._seized: list[int] = []
        self._batch = ""
        self._written_by = self._last = -1
        self._loop = asyncio.new_event_loop()
        try:
            self._wait(self._open())
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
            self.close()
            raise ConfigurationError(f"the journal's server cannot be used: {error}") from None
        except BaseException:
            self.close()
            raise

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(work)

    async def _open(self) -> None:
        await self._life.connect()
        await self._locks.take(STARTING, START_SECONDS)
        self.alone = not any(number < WORKERS_MAX for number in await self._locks.held())
        await self._make_tables()
        await self._book.connect()
        await self._take_worker()
        await self._locks.give(STARTING)

    async def _make_tables(self) -> None:
        found = await self._life.fetch("SELECT to_regclass('settings') IS NOT NULL")
        if not found[0][0]:
            await self._life.execute(
                f"BEGIN; CREATE SCHEMA IF NOT EXISTS {self._schema};"
                f"{dialect.translate_schema(SCHEMA)}; {WRITE_VERSION}; COMMIT"
            )
        ((version,),) = await self._life.fetch(READ_VERSION, VERSION_SETTING) or [(None,)]
        if version in map(str, MIGRATIONS):
            await self._migrate(int(version))
        elif version != str(SCHEMA_VERSION):
            raise ConfigurationError("this database has no journal that this version can read")

    async def _migrate(self, version: int) -> None:
        if not self.alone:
            raise JournalLocked("this journal is in use by an older version")
        changes = dialect.translate_schema(migrate_from(version))
        await self._life.execute(f"BEGIN; {changes}; {CHANGE_VERSION}; COMMIT")

    async def _take_worker(self) -> None:
        """Takes a number that nobody holds, and under which nothing is open."""
        busy = {number for (number,) in await self._life.fetch(rows.BUSY_WORKERS)}
        taken = busy | await self._locks.held()
        for number in range(WORKERS_MAX):
            if number not in taken and await self._locks.try_take(number):
                self.worker = number
                return
        raise ConfigurationError("this journal has too many workers")

    def close(self) -> None:
        """Ends both connections; may be called again."""
        if not self._loop.is_closed():
            self._wait(self._book.close())
            self._wait(self._life.close())
            self._loop.close()

    # Batches.

    def begin(self) -> Values:
        """Waits for our turn, but not for ever, and makes lost connections again."""
        return self._wait(self._begin())

    async def _begin(self) -> Values:
        for _ in range(TRIES):
            await self._come_back()
            try:
                totals = await self._lock_totals()
            except LOST:
                self._book.drop()
                continue
            # That took a round trip, in which we heard of it if our other connection was lost.
            if self._life.up:
                return totals
            await self._book.execute("ROLLBACK")
        raise StoreFailed("the connections to the server are lost")

    async def _lock_totals(self) -> Values:
        await self._book.execute("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE")
        ((*totals, self._batch, self._written_by),) = await self._book.fetch(LOCK_TOTALS)
        return tuple(totals)

    @property
    def undisturbed(self) -> bool:
        """Whether nobody has written since our last batch was committed."""
        return self._written_by == self._last

    async def _come_back(self) -> None:
        if not self._life.up:
            await self._life.connect()
            self._leading = False
            self._seen_free.clear()
            self._seized.clear()
            # It was free so long that another worker has it, and has settled our calls.
            if not await self._locks.try_take(self.worker):
                await self._take_worker()
        if not self._book.up:
            await self._book.connect()
            # It may be another server by now, which numbers its transactions anew.
            self._last = -1

    def look(self) -> Values:
        """Begins a transaction that sees one moment of the tables."""
        self._wait(self._book.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"))
        return self.select(rows.READ_TOTALS)[0]

    def commit(self) -> None:
        """Commits; a lost connection leaves open whether it did."""
        try:
            self._wait(self._book.execute("COMMIT"))
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
            if _refused(error):
                raise
            self._book.drop()
            raise CommitUnknown(f"lost over a commit: {error}", self._batch) from error
        self._last = int(self._batch) % 2**XMIN_BITS

    def committed(self, ticket: str) -> bool:
        """Asks the server what became of a transaction."""
        return self._wait(self._committed(ticket))

    async def _committed(self, ticket: str) -> bool:
        # To come back ends what is left of the lost connection, and so of its transaction.
        await self._come_back()
        ((status,),) = await self._book.fetch("SELECT pg_xact_status($1::text::xid8)", ticket)
        if status not in ("committed", "aborted"):
            raise StoreFailed(f"a commit is {status or 'forgotten'}")
        return bool(status == "committed")

    def end(self) -> None:
        """Takes back what was not committed; a connection that cannot even do that is dropped."""
        if self._book.in_transaction:
            try:
                self._wait(self._book.execute("ROLLBACK"))
            except BaseException:
                self._book.drop()
                raise

    # Rows.

    def select(self, statement: str, values: Values | Mapping[str, Any] = ()) -> list[Values]:
        """Runs one statement."""
        text, names = dialect.translate(statement)
        given = [values[name] for name in names] if isinstance(values, Mapping) else values
        return [tuple(row) for row in self._wait(self._book.fetch(text, *given))]

    def read_rows(self, table: Table, keys: Sequence[Values]) -> list[Values]:
        """Reads rows by their keys."""
        if not keys:
            return []
        statement, columns = dialect.read_rows(table, keys)
        return [tuple(row) for row in self._wait(self._book.fetch(statement, *columns))]

    def write_rows(self, table: Table, values: Sequence[Values]) -> None:
        """Inserts or changes rows."""
        self._wait(self._book.execute_many(dialect.write_row(table), values))

    # The other workers.

    def seize(self, worker: int) -> bool:
        """Whether this worker is dead: its number was free each time we looked, for long enough."""
        return self._wait(self._seize(worker))

    async def _seize(self, worker: int) -> bool:
        if worker in await self._locks.held():
            del self._seen_free[worker]
            return False
        self._seen_free[worker] += 1
        if self._seen_free[worker] < FREE_ROUNDS or not await self._locks.try_take(worker):
            return False
        self._seized.append(worker)
        return True

    def release(self) -> None:
        """Gives up the numbers of the dead."""
        while self._seized:
            worker = self._seized.pop()
            if self._life.up:
                self._wait(self._locks.give(worker))

    def lead(self) -> bool:
        """Holds the redeemer's lock, or takes it."""
        if not (self._leading and self._life.up):
            self._wait(self._come_back())
            self._leading = self._wait(self._locks.try_take(LEADING))
        return self._leading

    def explain(self, error: Exception) -> Exception:
        """Tells a row that can never be written from a database that cannot be used now."""
        match error:
            case asyncpg.IntegrityConstraintViolationError() | asyncpg.DataError():
                return RowRefused(str(error))
            case asyncpg.SerializationError() | asyncpg.DeadlockDetectedError():
                return Conflict(str(error))
            case asyncpg.PostgresError() | asyncpg.InterfaceError() | OSError() | TimeoutError():
                return StoreFailed(str(error) or type(error).__name__)
        return error


def _refused(error: Exception) -> bool:
    """Whether the server itself refused a COMMIT, with a connection that goes on."""
    state = getattr(error, "sqlstate", None) or "08"
    return isinstance(error, asyncpg.PostgresError) and not state.startswith(("08", "57"))

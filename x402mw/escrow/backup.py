"""Backup and restore: every row of one moment, from a database of either kind to one of either.

A backup is a SQLite file with the same tables, so it can be looked at and proven like any other
database; restoring it is the same copy the other way. Both are proven before they count.
"""

from collections.abc import Callable

from sqlalchemy import Connection, Table, delete, insert, inspect, select
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.core.errors import ConfigurationError
from x402mw.escrow import books, database, schema

Progress = Callable[[str, int], None]
"""Is told the table and how many of its rows are copied."""


async def copy(source: str, target: str, progress: Progress | None = None) -> int:
    """Copies all rows into an empty database and proves the copy; returns how many entries it has.

    Raises `ConfigurationError` if the target holds an escrow already, or if the source's books are
    wrong: then nothing is committed.
    """
    engine = database.open_engine(target)
    try:
        async with database.visiting(source) as reading, engine.begin() as writing:
            await _prepare(writing)
            for table in await writing.run_sync(_in_order):
                await _copy_table(reading, writing, table, progress or _silent)
            violations = await books.check(writing)
            if violations:
                raise ConfigurationError(f"these books are wrong: {violations[0]}")
            last = schema.service.c.entry_seq
            return int((await writing.execute(select(last))).scalar_one())
    finally:
        await engine.dispose()


async def _prepare(writing: AsyncConnection) -> None:
    if await writing.run_sync(lambda sync: inspect(sync).has_table("service")):
        raise ConfigurationError("the target holds an escrow already; choose an empty database")
    await database.migrate(writing)


def _in_order(connection: Connection) -> list[Table]:
    """Our tables, each behind those its rows refer to."""
    names = [name for name, _ in inspect(connection).get_sorted_table_and_fkc_names() if name]
    tables = schema.metadata.tables
    return [tables[name] for name in names if name in tables]


async def _copy_table(
    reading: AsyncConnection, writing: AsyncConnection, table: Table, progress: Progress
) -> None:
    # A new database holds what every one begins with, in tables whose rows may be deleted.
    if (await writing.execute(select(table).limit(1))).first() is not None:
        await writing.execute(delete(table))
    copied = 0
    async for rows in (await reading.stream(select(table))).partitions(books.ROWS_AT_ONCE):
        await writing.execute(insert(table), [row._asdict() for row in rows])
        copied += len(rows)
        progress(table.name, copied)
    progress(table.name, copied)


def _silent(_table: str, _rows: int) -> None:
    return

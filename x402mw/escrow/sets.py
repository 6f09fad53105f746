"""Many rows in one statement: a batch of a thousand vouchers may cost microseconds a row, not more.

PostgreSQL takes an array for each column (`unnest`), SQLite a statement for so many rows at a time:
one for each row would cost more, and hand the interpreter to and fro a thousand times. Values go to
the driver as they are, so rows hold what the columns hold: text, integers, None.
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from typing import Any

from sqlalchemy import Column, ColumnElement, Table, Text, any_, bindparam, func, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection

ROWS_AT_ONCE = 200
Rows = Sequence[Sequence[Any]]


async def insert_rows(
    connection: AsyncConnection, table: Table, columns: tuple[str, ...], rows: Rows
) -> None:
    """Writes new rows; each has a value for each of these columns."""
    dialect = connection.dialect.name
    await _run(connection, rows, lambda count: _insert_text(dialect, table, columns, count))


async def update_rows(
    connection: AsyncConnection, table: Table, key: str, columns: tuple[str, ...], rows: Rows
) -> None:
    """Sets these columns in the rows with this key; each row ends with its key, given once."""
    dialect, names = connection.dialect.name, (*columns, key)
    await _run(connection, rows, lambda count: _update_text(dialect, table, names, "", count))


async def add_to_rows(
    connection: AsyncConnection, table: Table, key: str, column: str, rows: Rows
) -> None:
    """Adds to one column of the rows with this key; each row is what to add, and its key."""
    dialect, names, plus = connection.dialect.name, (column, key), f"old.{column} + "
    await _run(connection, rows, lambda count: _update_text(dialect, table, names, plus, count))


def among(
    connection: AsyncConnection, column: Column[Any], values: Sequence[str]
) -> ColumnElement[bool]:
    """Tells whether a text is one of many, with one parameter however many there are."""
    if _is_postgresql(connection):
        return column == any_(bindparam(None, list(values), type_=ARRAY(Text)))
    return column.in_(select(func.json_each(_json(values)).table_valued("value").c.value))


def _json(values: Sequence[str]) -> str:
    # Ids only, which hold nothing that JSON would write differently.
    return "[" + ",".join(f'"{value}"' for value in values) + "]"


def _is_postgresql(connection: AsyncConnection) -> bool:
    return connection.dialect.name == "postgresql"


async def _run(connection: AsyncConnection, rows: Rows, text: Callable[[int], str]) -> None:
    """Runs a statement, whose text depends on how many rows it takes."""
    if not rows:
        return
    if _is_postgresql(connection):
        await connection.exec_driver_sql(text(0), tuple(map(list, zip(*rows, strict=True))))
        return
    # Of two sizes only, so that both stay prepared.
    rest = len(rows) % ROWS_AT_ONCE
    for start in range(rest, len(rows), ROWS_AT_ONCE):
        values = tuple(chain.from_iterable(rows[start : start + ROWS_AT_ONCE]))
        await connection.exec_driver_sql(text(ROWS_AT_ONCE), values)
    if rest:
        await connection.exec_driver_sql(text(1), list(map(tuple, rows[:rest])))


# Names of our own tables and columns only; what people send is in the parameters.


@cache
def _insert_text(dialect: str, table: Table, columns: tuple[str, ...], count: int) -> str:
    into = f"INSERT INTO {table.name} ({', '.join(columns)})"
    return f"{into} {_given(dialect, table, columns, count)}"


@cache
def _update_text(
    dialect: str, table: Table, columns: tuple[str, ...], plus: str, count: int
) -> str:
    *changed, key = columns
    given = f"WITH new ({', '.join(columns)}) AS ({_given(dialect, table, columns, count)})"
    sets = ", ".join(f"{name} = {plus}new.{name}" for name in changed)
    update = f"UPDATE {table.name} AS old SET {sets} FROM new"  # noqa: S608 (own names)
    return f"{given} {update} WHERE old.{key} = new.{key}"


def _given(dialect: str, table: Table, columns: tuple[str, ...], count: int) -> str:
    """The rows in the parameters."""
    if dialect == "sqlite":
        row = f"({', '.join('?' * len(columns))})"
        return f"VALUES {', '.join([row] * count)}"
    types = ("text[]" if isinstance(table.c[name].type, Text) else "bigint[]" for name in columns)
    arrays = ", ".join(f"${n}::{kind}" for n, kind in enumerate(types, start=1))
    return f"SELECT * FROM unnest({arrays})"  # noqa: S608 (own names)

"""Many rows in one statement: a batch of a thousand vouchers may cost microseconds a row, not more.

PostgreSQL takes an array for each column (`unnest`); SQLite runs one prepared statement over all
rows. Values go to the driver as they are, so rows hold what the columns hold: text, integers, None.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

from sqlalchemy import Column, ColumnElement, Table, Text, any_, bindparam, func, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection

Rows = Sequence[Sequence[Any]]


async def insert_rows(
    connection: AsyncConnection, table: Table, columns: tuple[str, ...], rows: Rows
) -> None:
    """Writes new rows; each has a value for each of these columns."""
    await _run(connection, _insert_text(connection.dialect.name, table, columns), rows)


async def update_rows(
    connection: AsyncConnection, table: Table, key: str, columns: tuple[str, ...], rows: Rows
) -> None:
    """Sets these columns in the rows with this key; each row ends with its key."""
    text = _update_text(connection.dialect.name, table, key, columns, added=False)
    await _run(connection, text, rows)


async def add_to_rows(
    connection: AsyncConnection, table: Table, key: str, column: str, rows: Rows
) -> None:
    """Adds to one column of the rows with this key; each row is what to add, and its key."""
    text = _update_text(connection.dialect.name, table, key, (column,), added=True)
    await _run(connection, text, rows)


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


async def _run(connection: AsyncConnection, text: str, rows: Rows) -> None:
    if not rows:
        return
    if _is_postgresql(connection):
        await connection.exec_driver_sql(text, tuple(map(list, zip(*rows, strict=True))))
    else:
        await connection.exec_driver_sql(text, list(map(tuple, rows)))


@cache
def _insert_text(dialect: str, table: Table, columns: tuple[str, ...]) -> str:
    # Names of our own tables and columns only; what people send is in the parameters.
    into = f"INSERT INTO {table.name} ({', '.join(columns)})"
    if dialect == "postgresql":
        return f"{into} SELECT * FROM {_unnest(table, columns)}"  # noqa: S608 (own names)
    return f"{into} VALUES ({', '.join('?' * len(columns))})"


@cache
def _update_text(
    dialect: str, table: Table, key: str, columns: tuple[str, ...], *, added: bool
) -> str:
    plus = "{0} + " if added else ""
    if dialect == "sqlite":
        sets = ", ".join(f"{name} = {plus.format(name)}?" for name in columns)
        return f"UPDATE {table.name} SET {sets} WHERE {key} = ?"  # noqa: S608 (own names)
    sets = ", ".join(f"{name} = {plus.format(f'old.{name}')}new.{name}" for name in columns)
    names = (*columns, key)
    new = f"{_unnest(table, names)} AS new ({', '.join(names)})"
    where = f"WHERE old.{key} = new.{key}"
    return f"UPDATE {table.name} AS old SET {sets} FROM {new} {where}"  # noqa: S608 (own names)


def _unnest(table: Table, columns: tuple[str, ...]) -> str:
    types = ("text[]" if isinstance(table.c[name].type, Text) else "bigint[]" for name in columns)
    return f"unnest({', '.join(f'${n}::{kind}' for n, kind in enumerate(types, start=1))})"

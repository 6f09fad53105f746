"""Many rows in one statement: a batch of a thousand vouchers may cost microseconds a row, not more.

PostgreSQL takes an array for each column (`unnest`), and several sets in one round trip. SQLite
takes a statement for so many rows at a time: one for each row would cost more, and hand the
interpreter to and fro a thousand times. Values go to the driver as they are, so rows hold what the
columns hold: text, integers, None.
"""

from collections.abc import Sequence
from enum import Enum
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

from sqlalchemy import Column, ColumnElement, Table, Text, any_, bindparam, func, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection

ROWS_AT_ONCE = 200


class Do(Enum):
    """What a set does with its rows; but for `INSERT` the last column is the key of one row.

    `ADD` adds to the second column where the first is what is given; where it is not, the sum is
    null, which the database refuses.
    """

    INSERT = "insert"
    UPDATE = "update"
    ADD = "add"


class Shape(NamedTuple):
    """What a set of rows is, without the rows."""

    do: Do
    table: Table
    columns: tuple[str, ...]


class Set(NamedTuple):
    """Rows to write; each has a value for each column, and no two have one key."""

    shape: Shape
    rows: Sequence[Sequence[Any]]


async def write(connection: AsyncConnection, *sets: Set) -> None:
    """Writes sets; none may build on rows that another one of them makes."""
    wanted = [each for each in sets if each.rows]
    if not wanted:
        return
    if _is_postgresql(connection):
        text = _together(tuple(each.shape for each in wanted))
        columns = (map(list, zip(*each.rows, strict=True)) for each in wanted)
        await connection.exec_driver_sql(text, tuple(chain.from_iterable(columns)))
        return
    for each in wanted:
        await _write_sqlite(connection, each)


async def _write_sqlite(connection: AsyncConnection, each: Set) -> None:
    shape, rows = each
    # Of two sizes only, so that both stay prepared.
    rest = len(rows) % ROWS_AT_ONCE
    for start in range(rest, len(rows), ROWS_AT_ONCE):
        values = tuple(chain.from_iterable(rows[start : start + ROWS_AT_ONCE]))
        await connection.exec_driver_sql(_sqlite_text(shape, ROWS_AT_ONCE), values)
    if rest:
        await connection.exec_driver_sql(_sqlite_text(shape, 1), list(map(tuple, rows[:rest])))


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


# Names of our own tables and columns only; what people send is in the parameters.


@cache
def _sqlite_text(shape: Shape, count: int) -> str:
    if count == 1 and shape.do is not Do.INSERT:
        return _update_one(shape)
    row = f"({', '.join('?' * len(shape.columns))})"
    return _text(shape, f"VALUES {', '.join([row] * count)}")


def _update_one(shape: Shape) -> str:
    *changed, key = shape.columns
    if shape.do is Do.ADD:
        what, total = changed
        sets = f"{total} = {total} + CASE {what} WHEN ? THEN ? END"
    else:
        sets = ", ".join(f"{name} = ?" for name in changed)
    return f"UPDATE {shape.table.name} SET {sets} WHERE {key} = ?"  # noqa: S608 (own names)


@cache
def _together(shapes: tuple[Shape, ...]) -> str:
    texts = [_text(shape, given) for shape, given in zip(shapes, _arrays(shapes), strict=True)]
    if len(texts) == 1:
        return texts[0]
    return f"WITH {', '.join(f's{n} AS ({text})' for n, text in enumerate(texts))} SELECT 1"


def _arrays(shapes: Sequence[Shape]) -> list[str]:
    """The rows of each shape, from parameters that count through all of them."""
    number, texts = iter(range(1, 1000)), []
    for shape in shapes:
        types = (shape.table.c[name].type for name in shape.columns)
        kinds = ("text[]" if isinstance(kind, Text) else "bigint[]" for kind in types)
        arrays = ", ".join(f"${next(number)}::{kind}" for kind in kinds)
        texts.append(f"SELECT * FROM unnest({arrays})")  # noqa: S608 (own names)
    return texts


def _text(shape: Shape, given: str) -> str:
    do, table, columns = shape
    names = ", ".join(columns)
    if do is Do.INSERT:
        return f"INSERT INTO {table.name} ({names}) {given}"
    *changed, key = columns
    if do is Do.ADD:
        what, total = changed
        sets = f"{total} = old.{total} + CASE old.{what} WHEN new.{what} THEN new.{total} END"
    else:
        sets = ", ".join(f"{name} = new.{name}" for name in changed)
    update = f"UPDATE {table.name} AS old SET {sets} FROM new"  # noqa: S608 (own names)
    return f"WITH new ({names}) AS ({given}) {update} WHERE old.{key} = new.{key}"

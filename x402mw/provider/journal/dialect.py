"""The journal's statements and tables, which are written for SQLite, in PostgreSQL's words."""

import re
from collections.abc import Sequence
from functools import cache

from x402mw.provider.journal.store import Table, Values

_PLACE = re.compile(r"\?|:([a-z_]+)")
_ARRAYS = {bytes: "bytea[]", int: "bigint[]"}
_TYPES = (
    (") STRICT, WITHOUT ROWID;", ");"),
    (") STRICT;", ");"),
    (" INTEGER", " BIGINT"),
    (" BLOB", " BYTEA"),
)


@cache
def translate(statement: str) -> tuple[str, tuple[str, ...]]:
    """Returns a statement with numbered places, and the names of its values if they have any."""
    names: list[str] = []

    def number(found: re.Match[str]) -> str:
        name = found[1] or str(len(names))
        if name not in names:
            names.append(name)
        return f"${names.index(name) + 1}"

    translated = _PLACE.sub(number, statement.replace("INDEXED BY calls_unsettled", ""))
    return translated, tuple(names)


@cache
def write_row(table: Table) -> str:
    """The statement that inserts or changes one row."""
    return table.insert(f"({', '.join(f'${number + 1}' for number in range(len(table.columns)))})")


def read_rows(table: Table, keys: Sequence[Values]) -> tuple[str, list[list[object]]]:
    """The statement that reads the rows of keys, and its values: one list for each key column."""
    columns = [list(column) for column in zip(*keys, strict=True)]
    types = tuple(_ARRAYS[type(column[0])] for column in columns)
    return _read(table, types), columns


@cache
def _read(table: Table, types: tuple[str, ...]) -> str:
    places = ", ".join(f"${number + 1}::{type_}" for number, type_ in enumerate(types))
    names = [f"key_{number}" for number in range(len(types))]
    return table.join(f"unnest({places}) AS k ({', '.join(names)})", names)


def translate_schema(schema: str) -> str:
    """The tables: every number is one of 64 bits, and the checks are the same."""
    for theirs, ours in _TYPES:
        schema = schema.replace(theirs, ours)
    return schema

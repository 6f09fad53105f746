"""Reads rows as the values that the rules speak of."""

from operator import itemgetter
from typing import Any

from sqlalchemy import Column, ColumnElement, Select, bindparam, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.escrow import schema
from x402mw.escrow.rules.values import Escrow

# Made once: to build a statement costs more than to run it.
_ONE = select(schema.escrows).where(schema.escrows.c.escrow_id == bindparam("wanted"))
_BALANCE = select(schema.accounts.c.balance).where(schema.accounts.c.account == bindparam("wanted"))


async def fetch_escrows(
    connection: AsyncConnection, query: Select[Any], values: dict[str, Any] | None = None
) -> list[Escrow]:
    """Runs a query for whole rows of `escrows`."""
    rows = await connection.execute(query, values)
    names = list(rows.keys())
    in_order = itemgetter(*map(names.index, Escrow._fields))
    return [Escrow._make(in_order(row)) for row in rows.all()]


async def find_escrow(connection: AsyncConnection, escrow_id: str) -> Escrow | None:
    """The escrow with this id, if there is one."""
    found = await fetch_escrows(connection, _ONE, {"wanted": escrow_id})
    return found[0] if found else None


async def balance_of(connection: AsyncConnection, account: str) -> int:
    """The stored balance of an account that exists, in atomic units."""
    return int((await connection.execute(_BALANCE, {"wanted": account})).scalar_one())


_HALF = 2**32


def whole_sum(column: Column[Any]) -> tuple[ColumnElement[Any], ColumnElement[Any]]:
    """Sums a column in two halves: money that turns over sums to more than an integer holds.

    SQLite would refuse such a sum; of halves it holds those of two thousand million rows.
    """
    return func.sum(column // _HALF), func.sum(column % _HALF)


def join_sum(high: int, low: int) -> int:
    """Puts both halves together."""
    return int(high) * _HALF + int(low)

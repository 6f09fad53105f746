"""Reads rows as the values that the rules speak of."""

from operator import itemgetter
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.escrow import schema
from x402mw.escrow.rules import Escrow


async def fetch_escrows(connection: AsyncConnection, query: Select[Any]) -> list[Escrow]:
    """Runs a query for whole rows of `escrows`."""
    rows = await connection.execute(query)
    names = list(rows.keys())
    in_order = itemgetter(*map(names.index, Escrow._fields))
    return [Escrow._make(in_order(row)) for row in rows]


async def find_escrow(connection: AsyncConnection, escrow_id: str) -> Escrow | None:
    """The escrow with this id, if there is one."""
    query = select(schema.escrows).where(schema.escrows.c.escrow_id == escrow_id)
    found = await fetch_escrows(connection, query)
    return found[0] if found else None


async def balance_of(connection: AsyncConnection, account: str) -> int:
    """The stored balance of an account that exists, in atomic units."""
    accounts = schema.accounts.c
    query = select(accounts.balance).where(accounts.account == account)
    return int((await connection.execute(query)).scalar_one())

"""What an operator wants to know of the books at one moment, and the proof that they are right."""

from typing import NamedTuple

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.core.amounts import Atomic
from x402mw.escrow import books, schema
from x402mw.escrow.database import visiting
from x402mw.escrow.rows import join_sum, whole_sum


class ClassSum(NamedTuple):
    """Accounts of one class and asset: how many, and what they hold together (atomic)."""

    asset: str
    kind: str
    number: int
    balance: int


class StatusSum(NamedTuple):
    """Escrows of one asset, kind and status: how many, and their sums (atomic)."""

    asset: str
    kind: str
    status: str
    number: int
    locked: Atomic
    released: Atomic
    refunded: Atomic
    disputed: Atomic


class Statement(NamedTuple):
    """One moment of the books. `violations` is empty if I1 to I20 hold."""

    entries: int
    accounts: list[ClassSum]
    escrows: list[StatusSum]
    violations: list[str]


async def draw_up(url: str) -> Statement:
    """Reads a whole database in one transaction, beside the service."""
    async with visiting(url) as connection:
        entries = select(func.count()).select_from(schema.entries)
        return Statement(
            entries=int((await connection.execute(entries)).scalar_one()),
            accounts=await _sum_accounts(connection),
            escrows=await _sum_escrows(connection),
            violations=await books.check(connection),
        )


async def _sum_accounts(connection: AsyncConnection) -> list[ClassSum]:
    accounts = schema.accounts.c
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    query = select(accounts.account, accounts.asset, accounts.balance)
    async for account, asset, balance in await connection.stream(query):
        key = (asset, account.partition(":")[0])
        count, held = sums.get(key, (0, 0))
        sums[key] = (count + 1, held + balance)
    return [ClassSum(*key, *found) for key, found in sorted(sums.items())]


async def _sum_escrows(connection: AsyncConnection) -> list[StatusSum]:
    escrows = schema.escrows.c
    group = (escrows.asset, escrows.kind, escrows.status)
    columns = (escrows.amount, escrows.released, escrows.refunded, escrows.disputed)
    halves = [half for column in columns for half in whole_sum(column)]
    query = select(*group, func.count(), *halves).group_by(*group).order_by(*group)
    found = []
    for row in (await connection.execute(query)).all():
        pairs = zip(row[4::2], row[5::2], strict=True)
        found.append(StatusSum(*row[:4], *(Atomic(join_sum(*pair)) for pair in pairs)))
    return found

"""Reads the log after some entry: whole entries, the events they are, and one escrow's history."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import literal, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.core.amounts import Atomic, display
from x402mw.escrow import schema
from x402mw.escrow.books import Entry
from x402mw.escrow.events.derive import REVOCATIONS, Told, tell
from x402mw.escrow.rules.values import Transfer, agent_account

ENTRIES_AT_ONCE = 500
_WITH_PARTIES = (
    select(schema.entries, schema.escrows.c.buyer, schema.escrows.c.provider)
    .select_from(
        schema.entries.outerjoin(
            schema.escrows, schema.escrows.c.escrow_id == schema.entries.c.escrow_id
        )
    )
    .order_by(schema.entries.c.seq)
)


class Read(NamedTuple):
    """Some events in order, and the number of the last entry that was read for them."""

    events: list[Told]
    upto: int


async def find_head(connection: AsyncConnection) -> int:
    """The number of the newest entry."""
    return int((await connection.execute(select(schema.service.c.entry_seq))).scalar_one())


async def read_events(connection: AsyncConnection, since: int) -> Read:
    """The events of the next entries after one."""
    query = _WITH_PARTIES.where(schema.entries.c.seq > since).limit(ENTRIES_AT_ONCE)
    rows = (await connection.execute(query)).all()
    return Read(await _tell_all(connection, rows), rows[-1].seq if rows else since)


async def read_events_of(
    connection: AsyncConnection, agent_id: str, escrow_id: str | None, since: int, upto: int
) -> list[Told]:
    """Events after an entry and up to another that are for an agent, of all its escrows or one."""
    entries, escrows = schema.entries, schema.escrows
    mine = escrows.c.buyer == agent_id, escrows.c.provider == agent_id
    one = or_(*mine, entries.c.kind.in_(REVOCATIONS))
    if escrow_id is not None:
        one = entries.c.escrow_id == escrow_id
    query = _WITH_PARTIES.where(entries.c.seq > since, entries.c.seq <= upto, one)
    events = await _tell_all(connection, (await connection.execute(query)).all())
    return [told for told in events if agent_id in told.parties]


async def _tell_all(connection: AsyncConnection, rows: Sequence[Any]) -> list[Told]:
    moves = await _read_moves(connection, [row.seq for row in rows])
    return [
        told for row in rows for told in tell(_entry(row, moves[row.seq]), row.buyer, row.provider)
    ]


async def _read_moves(
    connection: AsyncConnection, numbers: Sequence[int]
) -> dict[int, list[Transfer]]:
    lines, found = schema.postings.c, defaultdict[int, list[Transfer]](list)
    if numbers:
        query = select(lines.seq, lines.source, lines.target, lines.amount)
        # Numbers without gaps are a range; those of one escrow are few.
        spread = max(numbers) - min(numbers) < len(numbers)
        wanted = lines.seq.between(min(numbers), max(numbers)) if spread else lines.seq.in_(numbers)
        for row in await connection.execute(query.where(wanted).order_by(lines.seq, lines.line)):
            found[row.seq].append(Transfer(row.source, row.target, row.amount))
    return found


def _entry(row: Any, moves: Sequence[Transfer]) -> Entry:
    says = {name: getattr(row, name) for name in Entry._fields if name != "transfers"}
    return Entry(**says, transfers=tuple(moves))


async def read_history(
    connection: AsyncConnection, escrow_id: str, newest: int | None, limit: int
) -> list[Entry]:
    """Up to so many entries about one escrow, from one of them back to the oldest.

    Each entry names the one before, so other escrows make no difference.
    """
    entries = schema.entries
    start = select(entries, literal(1).label("place")).where(
        entries.c.seq == newest, entries.c.escrow_id == escrow_id
    )
    walk = start.cte("walk", recursive=True)
    earlier = select(entries, walk.c.place + 1).where(
        entries.c.seq == walk.c.before, walk.c.place < limit
    )
    walk = walk.union_all(earlier)
    rows = (await connection.execute(select(walk).order_by(walk.c.place))).all()
    moves = await _read_moves(connection, [row.seq for row in rows])
    return [_entry(row, moves[row.seq]) for row in rows]


def describe(entry: Entry, buyer: str, data: dict[str, Any]) -> dict[str, Any]:
    """One line of a history."""
    account, home = f"escrow:{entry.escrow_id}", agent_account(buyer)
    locked = sum(move.amount for move in entry.transfers if move.target == account)
    out = [move for move in entry.transfers if move.source == account]
    refunded = sum(move.amount for move in out if move.target == home)
    fees = sum(move.amount for move in out if move.target.startswith("house:"))
    # Not out of the escrow: the provider gives back what it was paid.
    beside = sum(
        move.amount for move in entry.transfers if move.target == home and move.source != account
    )
    amounts = {
        "locked": locked,
        "released": sum(move.amount for move in out) - refunded,
        "fee": fees,
        "refunded": refunded,
        "returned": beside,
    }
    return {
        "id": str(entry.seq),
        "kind": entry.kind,
        "actor": entry.actor,
        "at": entry.created_at,
        "effective_at": entry.effective_at,
        **{name: display(Atomic(amount)) for name, amount in amounts.items()},
        "data": data,
    }

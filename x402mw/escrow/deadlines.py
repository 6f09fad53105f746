"""Time in the ledger: the heartbeat that tells outages, and deadlines applied to escrows.

Whoever first meets a deadline applies it, stamped with the time at which it counted (T2), and an
outage postpones it (T5): both in `docs/money.md` 6.
"""

import logging
from enum import Enum
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Select, Text, bindparam, select
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.escrow import agreements, schema
from x402mw.escrow.rows import fetch_escrows
from x402mw.escrow.rules.outage import effective_deadline
from x402mw.escrow.rules.session import reach_deadline
from x402mw.escrow.rules.table import Event
from x402mw.escrow.rules.values import MANUAL, Escrow
from x402mw.escrow.transactions import Transaction

_log = logging.getLogger("x402mw.escrow")

HEARTBEAT_SECONDS = 10
GAP_SECONDS = 60
SKEW_SECONDS = 600
"""How far the clocks of hosts that share one database may be apart."""

SWEEP_ITEMS_MAX = 500
"""How much one transaction does, in escrows and in entries: everybody else waits meanwhile."""

NO_LIMIT = 2**31 - 1


class Of(Enum):
    """Whose escrows are looked at."""

    ALL = "all"
    PARTY = "party"
    ONE = "one"


async def beat(tx: Transaction) -> None:
    """Notes that the service is alive; after a gap, deadlines start to wait for everyone.

    What was due before the service was last seen alive is applied first: then it makes no
    difference to anyone whether a sweeper had come by (I14).
    """
    service = tx.service
    # A heartbeat a little ahead of us is another host's, whose clock is; it is no less alive.
    if -SKEW_SECONDS <= tx.now - service.heartbeat < HEARTBEAT_SECONDS:
        return
    if tx.now - service.heartbeat > GAP_SECONDS:
        await apply(tx, at=service.heartbeat)
        tx.service.up_since = tx.now
    # A clock that was wrong and is set back must not leave the deadlines waiting for it.
    tx.service.up_since = min(tx.service.up_since, tx.now)
    tx.service.heartbeat = tx.now
    tx.checkpoint_wanted = await _wants_checkpoint(tx)


def last_alive(tx: Transaction) -> int:
    """Up to when deadlines have passed, for a command that cannot know whether the service runs."""
    heartbeat = tx.service.heartbeat
    return tx.now if tx.now - heartbeat <= GAP_SECONDS else heartbeat


async def _wants_checkpoint(tx: Transaction) -> bool:
    """Tells whether there are entries that no checkpoint covers, and the last one is old."""
    points = schema.checkpoints.c
    newest = select(points.seq, points.created_at).order_by(points.seq.desc()).limit(1)
    row = (await tx.connection.execute(newest)).first()
    if row is None:
        return tx.service.entry_seq > 0
    due = tx.now - row.created_at >= tx.settings.checkpoint_seconds
    return due and bool(row.seq < tx.service.entry_seq)


async def apply(
    tx: Transaction,
    party: str | None = None,
    *,
    at: int | None = None,
    limit: int | None = None,
) -> int:
    """Does what time has done, to escrows of one party or of all, at most `limit`; says how many.

    What it does stays, whatever is refused after it.
    """
    now = tx.now if at is None else at
    of = Of.ALL if party is None else Of.PARTY
    return await _apply(tx, of, party, now, NO_LIMIT if limit is None else limit)


async def apply_to_one(tx: Transaction, escrow_id: str) -> None:
    """Does what time has done to one escrow, whoever asks."""
    await _apply(tx, Of.ONE, escrow_id, tx.now, NO_LIMIT)


async def _apply(tx: Transaction, of: Of, name: str | None, now: int, limit: int) -> int:
    earliest = effective_deadline(0, tx.service.up_since)
    if now < earliest:
        return 0
    values = {"now": now, "name": name, "limit": limit}
    due = await fetch_escrows(tx.connection, due_query(of), values)
    if due:
        # What time has done was done while the service was alive: an outage from now on hides none.
        tx.service.heartbeat = max(tx.service.heartbeat, now)
    end, found = tx.service.entry_seq + limit, len(due)
    for escrow in due:
        if tx.service.entry_seq >= end:
            found = limit
            break
        if escrow.kind == MANUAL:
            found -= not await _apply_manual(tx, escrow, now)
            continue
        counts_at = max(escrow.due_at or 0, earliest)
        with tx.by_time():
            tx.save(escrow, reach_deadline(escrow), Event.DEADLINE.value, counts_at)
    await tx.flush()
    return found


async def _apply_manual(tx: Transaction, escrow: Escrow, now: int) -> bool:
    """Does what time has done, unless rows are damaged: those of one must not stop everybody."""
    try:
        agreement = await agreements.load(tx.connection, escrow)
    except (ValueError, LookupError, ArithmeticError):
        extra = {"event": "deadline_failed", "escrow": escrow.escrow_id}
        _log.exception("a deadline could not be applied", extra=extra)
        return False
    await agreements.pass_time(tx, agreement, now)
    return True


async def any_due(connection: AsyncConnection, of: Of, name: str, now: int) -> bool:
    """Tells whether there is something to apply: what an outage postpones is not due yet (T5)."""
    values = {"now": now, "name": name, "limit": 1}
    found = (await connection.execute(due_query(of), values)).first()
    return found is not None and await passed(connection, now) == now


async def passed(connection: AsyncConnection, now: int) -> int:
    """Up to when deadlines count at `now`: none do while an outage keeps them all waiting (T5)."""
    up_since = (await connection.execute(select(schema.service.c.up_since))).scalar_one()
    return now if now >= effective_deadline(0, up_since) else 0


@cache
def due_query(of: Of) -> Select[Any]:
    """Escrows that time has something to do to at `now`, up to a `limit`; `name` says whose.

    Made once for each case: to build a statement costs more than to run it.
    """
    escrows = schema.escrows.c
    query = select(schema.escrows).where(escrows.due_at <= bindparam("now"))
    if of is Of.ONE:
        query = query.where(escrows.escrow_id == bindparam("name"))
    elif of is Of.PARTY:
        query = query.where(_of_party())
    return query.limit(bindparam("limit"))


def _of_party() -> ColumnElement[bool]:
    """Escrows that can move money to or from an agent.

    That is its buyer, its provider, its payees and its referrer: what they may spend must not
    depend on whether a sweeper has come by (I14).
    """
    escrows, name = schema.escrows.c, bindparam("name", type_=Text)
    # Few are due at any time, but an agent may have had very many: no index by party is wanted.
    is_party = name.in_([escrows.buyer, escrows.provider, escrows.referrer])
    return is_party | escrows.payees.contains(name)

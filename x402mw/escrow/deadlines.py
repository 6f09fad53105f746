"""Time in the ledger: the heartbeat that tells outages, and deadlines applied to escrows.

Whoever first meets a deadline applies it, stamped with the time at which it counted (T2), and an
outage postpones it (T5): both in `docs/money.md` 6.
"""

from typing import Any

from sqlalchemy import BindParameter, ColumnElement, bindparam, func, literal, select, true

from x402mw.escrow import schema
from x402mw.escrow.rows import fetch_escrows
from x402mw.escrow.rules import (
    LIVE_STATUSES,
    UP_GRACE_SECONDS,
    Event,
    effective_deadline,
    reach_deadline,
)
from x402mw.escrow.transactions import Transaction

HEARTBEAT_SECONDS = 10
GAP_SECONDS = 60
SKEW_SECONDS = 600
"""How far the clocks of hosts that share one database may be apart."""

SWEEP_ITEMS_MAX = 500


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


async def apply(
    tx: Transaction,
    party: str | None = None,
    *,
    at: int | None = None,
    limit: int | None = None,
) -> int:
    """Sends home what is due, of one party or of all, at most `limit`; returns how many.

    What it does stays, whatever is refused after it.
    """
    now, up_since = tx.now if at is None else at, tx.service.up_since
    if now < up_since + UP_GRACE_SECONDS:
        return 0
    query = select(schema.escrows).where(due_before(now), of_party(party)).limit(limit)
    due = await fetch_escrows(tx.connection, query)
    for escrow in due:
        nominal = effective_deadline(escrow.deadline, up_since)
        tx.save(escrow, reach_deadline(escrow), Event.DEADLINE.value, effective_at=nominal)
    await tx.flush()
    return len(due)


def due_before(now: int) -> ColumnElement[bool]:
    """Live escrows whose deadline has come, outages apart."""
    escrows = schema.escrows.c
    deadline = func.coalesce(escrows.closing_deadline, escrows.expires_at)
    # Written out, not bound: only so can a database see that the index of live escrows serves.
    live: BindParameter[Any] = bindparam(
        "live", LIVE_STATUSES, expanding=True, literal_execute=True
    )
    return escrows.status.in_(live) & (deadline <= now)


def of_party(agent_id: str | None) -> ColumnElement[bool]:
    """Escrows that an agent is buyer or provider of; of everyone for None."""
    if agent_id is None:
        return true()
    # Few are due at any time, but an agent may have had very many: no index by party is wanted.
    return literal(agent_id).in_([schema.escrows.c.buyer, schema.escrows.c.provider])

"""Time in the ledger: the heartbeat that tells outages, and deadlines applied to escrows.

Whoever first meets a deadline applies it, stamped with the time at which it counted (T2), and an
outage postpones it (T5): both in `docs/money.md` 6.
"""

from sqlalchemy import ColumnElement, literal, select, true

from x402mw.escrow import agreements, schema
from x402mw.escrow.rows import fetch_escrows
from x402mw.escrow.rules.session import UP_GRACE_SECONDS, effective_deadline, reach_deadline
from x402mw.escrow.rules.table import Event
from x402mw.escrow.rules.values import MANUAL
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
    return await _apply_to(tx, of_party(party), tx.now if at is None else at, limit)


async def apply_to_one(tx: Transaction, escrow_id: str) -> None:
    """Does what time has done to one escrow, whoever asks."""
    await _apply_to(tx, schema.escrows.c.escrow_id == escrow_id, tx.now, None)


async def _apply_to(
    tx: Transaction, which: ColumnElement[bool], now: int, limit: int | None
) -> int:
    up_since = tx.service.up_since
    query = select(schema.escrows).where(due_before(now, up_since), which).limit(limit)
    due = await fetch_escrows(tx.connection, query)
    for escrow in due:
        if escrow.kind == MANUAL:
            await agreements.pass_time(tx, await agreements.load(tx.connection, escrow), now)
            continue
        nominal = effective_deadline(escrow.due_at or 0, up_since)
        with tx.by_time():
            tx.save(escrow, reach_deadline(escrow), Event.DEADLINE.value, nominal)
    await tx.flush()
    return len(due)


def due_before(now: int, up_since: int) -> ColumnElement[bool]:
    """Escrows that time has something to do to; for sessions an outage postpones it (T5)."""
    escrows = schema.escrows.c
    due = escrows.due_at <= now
    return due if now >= up_since + UP_GRACE_SECONDS else due & (escrows.kind == MANUAL)


def of_party(agent_id: str | None) -> ColumnElement[bool]:
    """Escrows that can move money to or from an agent; those of everyone for None.

    That is its buyer, its provider, its payees and its referrer: what they may spend must not
    depend on whether a sweeper has come by (I14).
    """
    if agent_id is None:
        return true()
    escrows = schema.escrows.c
    # Few are due at any time, but an agent may have had very many: no index by party is wanted.
    is_party = literal(agent_id).in_([escrows.buyer, escrows.provider, escrows.referrer])
    return is_party | escrows.payees.contains(agent_id)

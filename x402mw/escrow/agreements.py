"""The rows of manual escrows: read as one agreement, written as what has changed of it."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from sqlalchemy import Row, bindparam, func, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.core.amounts import ZERO, Atomic, atomic, display
from x402mw.escrow import schema
from x402mw.escrow.rules import manual, step
from x402mw.escrow.rules.agreement import Agreement, Dispute, Part, PartState
from x402mw.escrow.rules.outage import effective_deadline
from x402mw.escrow.rules.table import Event
from x402mw.escrow.rules.values import Escrow
from x402mw.escrow.terms import Extra
from x402mw.escrow.transactions import Transaction

OPEN, WITHDRAWN, RESOLVED, UNDECIDED = "open", "withdrawn", "resolved", "undecided"
RAISED = "raised"
"""What may have become of a dispute."""

_DECIDED = {
    Event.DISPUTE: RAISED,
    Event.WITHDRAW: WITHDRAWN,
    Event.RESOLVE: RESOLVED,
    Event.UNDECIDED: UNDECIDED,
}
_ABOUT_ONE = {Event.DELIVER, Event.REJECT, Event.APPROVE, Event.REVIEW_END}
"""What happens to one part of an agreement."""


# Made once: to build a statement costs more than to run it.
_ROW = select(schema.agreements).where(schema.agreements.c.escrow_id == bindparam("name"))
_WITH_PARTS = (
    select(schema.parts, schema.agreements.c.carry, schema.agreements.c.review_seconds)
    .join(schema.agreements, schema.agreements.c.escrow_id == schema.parts.c.escrow_id)
    .where(schema.parts.c.escrow_id == bindparam("name"))
    .order_by(schema.parts.c.number)
)


async def load(connection: AsyncConnection, escrow: Escrow) -> Agreement:
    """The whole agreement of a manual escrow."""
    name = escrow.escrow_id
    # Each agreement has a part at least.
    rows = (await connection.execute(_WITH_PARTS, {"name": name})).all()
    return Agreement(
        escrow=escrow,
        parts=tuple(map(_part, rows)),
        carry=Fraction(rows[0].carry),
        review_seconds=rows[0].review_seconds,
        dispute=await _load_dispute(connection, name) if escrow.disputed else None,
    )


async def find_row(connection: AsyncConnection, escrow_id: str) -> Any:
    """The row of an agreement, with the condition it was made under."""
    return (await connection.execute(_ROW, {"name": escrow_id})).one()


def _part(row: Row[Any]) -> Part:
    return Part(
        number=row.number,
        name=row.name,
        amount=Atomic(row.amount),
        state=PartState(row.state),
        proof=row.proof,
        review_until=row.review_until,
    )


async def _load_dispute(connection: AsyncConnection, escrow_id: str) -> Dispute:
    disputes = schema.disputes
    query = select(disputes).where(disputes.c.escrow_id == escrow_id)
    newest = (await connection.execute(query.order_by(disputes.c.number.desc()).limit(2))).all()
    row = newest[0]
    return Dispute(
        number=row.number,
        opener=row.opener,
        part=row.part,
        opened_at=row.opened_at,
        deadline=row.deadline,
        raised=newest[-1].status == RAISED,
    )


async def create(
    tx: Transaction, agreement: Agreement, locked: Agreement, condition: str
) -> Escrow:
    """Writes a new agreement; everything that might refuse it was decided."""
    parts = [(part.number, part.name, part.amount) for part in agreement.parts]
    extra = Extra(condition, agreement.review_seconds, parts)
    escrow = tx.lock(agreement.escrow, locked.escrow, extra)
    await tx.flush()
    await tx.insert(
        schema.agreements,
        {
            "escrow_id": escrow.escrow_id,
            "carry": str(agreement.carry),
            "condition": condition,
            "review_seconds": agreement.review_seconds,
        },
    )
    await tx.insert(schema.parts, *(_part_row(escrow, part) for part in agreement.parts))
    return escrow


async def keep(
    tx: Transaction,
    before: Agreement,
    after: Agreement,
    event: Event,
    *,
    effective_at: int | None = None,
    **said: Any,
) -> Agreement:
    """Writes what an event changed, the last thing of an operation; `said` goes into its entry."""
    told = {**said, **_tell_part(before, after, event)}
    data = {name: value for name, value in told.items() if value not in (None, "")}
    data |= _say(before, after, event)
    escrow = tx.save(before.escrow, after.escrow, event.value, effective_at, data=data or None)
    if after.carry != before.carry:
        agreements = schema.agreements
        await tx.connection.execute(
            update(agreements)
            .where(agreements.c.escrow_id == escrow.escrow_id)
            .values(carry=str(after.carry))
        )
    for old, new in zip(before.parts, after.parts, strict=True):
        if new != old:
            await _write_part(tx, escrow, new)
    ended, opened = _changed_disputes(before, after)
    if ended is not None:
        await _end_dispute(tx, before, after, event, said.get("arbiter"))
    if opened is not None:
        now = after._replace(escrow=escrow)
        await _open_dispute(tx, now, opened, str(said.get("reason", "")))
    return after._replace(escrow=escrow)


def _changed_disputes(before: Agreement, after: Agreement) -> tuple[Dispute | None, Dispute | None]:
    """The dispute that has ended, and the one that was opened."""
    if before.dispute == after.dispute:
        return None, None
    return before.dispute, after.dispute


def _tell_part(before: Agreement, after: Agreement, event: Event) -> dict[str, Any]:
    """Which milestone this is about, and until when its delivery waits for an answer."""
    if event not in _ABOUT_ONE:
        return {}
    for old, new in zip(before.parts, after.parts, strict=True):
        if new != old:
            until = new.review_until if event is Event.DELIVER else None
            return {"part": new.number, "milestone": new.name, "review_until": until}
    return {}


def _say(before: Agreement, after: Agreement, event: Event) -> dict[str, Any]:
    """What an entry says of the rows that it changed, so that they can be held to it (I20)."""
    changed = [new for old, new in zip(before.parts, after.parts, strict=True) if new != old]
    parts = [(part.number, part.state.value, part.review_until) for part in changed]
    said: dict[str, Any] = {"parts": parts} if parts else {}
    if event is Event.DELIVER:
        said["proof"] = changed[0].proof
    if after.escrow.expires_at != before.escrow.expires_at:
        said["expires_at"] = after.escrow.expires_at
    if after.carry != before.carry:
        said["carry"] = str(after.carry)
    ended, opened = _changed_disputes(before, after)
    if opened is not None:
        said["dispute"] = {
            "number": opened.number,
            "part": opened.part,
            "amount": display(after.escrow.disputed),
            "deadline": opened.deadline,
        }
        if ended is not None:
            said["raises"] = ended.number
    elif ended is not None:
        to_provider, to_buyer = map(display, _decided(before, after, event))
        shares = {"to_provider": to_provider, "to_buyer": to_buyer}
        said["dispute"] = {"number": ended.number, "status": _DECIDED[event], **shares}
    return said


def _decided(before: Agreement, after: Agreement, event: Event) -> tuple[Atomic, Atomic]:
    """How the end of a dispute shared out what was held."""
    if event not in (Event.RESOLVE, Event.UNDECIDED):
        return ZERO, ZERO
    old, new = before.escrow, after.escrow
    return atomic(new.released - old.released), atomic(new.refunded - old.refunded)


def _part_row(escrow: Escrow, part: Part) -> dict[str, Any]:
    return {
        "escrow_id": escrow.escrow_id,
        "number": part.number,
        "name": part.name,
        "amount": part.amount,
        "state": part.state.value,
        "proof": part.proof,
        "review_until": part.review_until,
    }


async def _write_part(tx: Transaction, escrow: Escrow, part: Part) -> None:
    parts = schema.parts
    await tx.connection.execute(
        update(parts)
        .where(parts.c.escrow_id == escrow.escrow_id, parts.c.number == part.number)
        .values(state=part.state.value, proof=part.proof, review_until=part.review_until)
    )


async def _open_dispute(
    tx: Transaction, agreement: Agreement, opened: Dispute, reason: str
) -> None:
    await tx.insert(
        schema.disputes,
        {
            "escrow_id": agreement.escrow.escrow_id,
            "number": opened.number,
            "status": OPEN,
            "opener": opened.opener,
            "reason": reason,
            "part": opened.part,
            "amount": agreement.escrow.disputed,
            "opened_at": opened.opened_at,
            "deadline": opened.deadline,
            "entry": agreement.escrow.last_entry,
            "to_provider": 0,
            "to_buyer": 0,
        },
    )


async def _end_dispute(
    tx: Transaction, before: Agreement, after: Agreement, event: Event, arbiter: str | None
) -> None:
    disputes, open_ones = schema.disputes, schema.disputes.c.status == OPEN
    to_provider, to_buyer = _decided(before, after, event)
    await tx.connection.execute(
        update(disputes)
        .where(disputes.c.escrow_id == before.escrow.escrow_id, open_ones)
        .values(
            status=_DECIDED[event],
            to_provider=to_provider,
            to_buyer=to_buyer,
            arbiter=arbiter,
            decided_at=tx.now,
        )
    )


async def count_disputes(connection: AsyncConnection, escrow_id: str) -> int:
    """How many disputes an escrow has had."""
    query = select(func.count()).where(schema.disputes.c.escrow_id == escrow_id)
    return int((await connection.execute(query)).scalar_one())


async def count_withdrawn(connection: AsyncConnection, escrow_id: str, opened: Dispute) -> int:
    """How many disputes over the same thing their opener has taken back, or left undecided."""
    disputes = schema.disputes.c
    query = select(func.count()).where(
        disputes.escrow_id == escrow_id,
        disputes.status.in_([WITHDRAWN, UNDECIDED]),
        disputes.opener == opened.opener,
        disputes.part.is_not_distinct_from(opened.part),
    )
    return int((await connection.execute(query)).scalar_one())


_DISPUTES = (
    select(
        schema.disputes,
        schema.escrows.c.buyer,
        schema.escrows.c.provider,
        schema.parts.c.name.label("milestone"),
    )
    .join(schema.escrows, schema.escrows.c.escrow_id == schema.disputes.c.escrow_id)
    .outerjoin(
        schema.parts,
        (schema.parts.c.escrow_id == schema.disputes.c.escrow_id)
        & (schema.parts.c.number == schema.disputes.c.part),
    )
)


async def open_disputes(
    connection: AsyncConnection,
    *,
    asset: str,
    passed: int,
    limit: int,
    after: tuple[int, str] | None,
) -> Sequence[Any]:
    """Disputes that wait for a decision, oldest first, from after (entry, escrow id).

    Not those whose deadline has `passed`, which time only has not been applied to.

    By the number of their entry: what is opened later comes later, also within one second.
    """
    disputes = schema.disputes.c
    query = _DISPUTES.where(
        disputes.status == OPEN, disputes.deadline > passed, schema.escrows.c.asset == asset
    )
    if after is not None:
        query = query.where(tuple_(disputes.entry, disputes.escrow_id) > after)
    query = query.order_by(disputes.entry, disputes.escrow_id).limit(limit)
    return (await connection.execute(query)).all()


async def disputes_of(
    connection: AsyncConnection, escrow_id: str, *, limit: int, after: int | None
) -> Sequence[Any]:
    """The disputes an escrow has had, newest first, from before number `after`."""
    disputes = schema.disputes.c
    query = _DISPUTES.where(disputes.escrow_id == escrow_id)
    if after is not None:
        query = query.where(disputes.number < after)
    return (await connection.execute(query.order_by(disputes.number.desc()).limit(limit))).all()


async def evidence_of(
    connection: AsyncConnection, escrow_id: str, numbers: Sequence[int]
) -> dict[int, list[dict[str, Any]]]:
    """What was said in some disputes of an escrow, by their numbers, in order."""
    evidence = schema.evidence
    query = select(evidence).where(
        evidence.c.escrow_id == escrow_id, evidence.c.number.in_(numbers)
    )
    said: dict[int, list[dict[str, Any]]] = {}
    for row in await connection.execute(query.order_by(evidence.c.number, evidence.c.line)):
        line = {"agent_id": row.agent_id, "content": row.content, "created_at": row.created_at}
        said.setdefault(row.number, []).append(line)
    return said


def describe_dispute(row: Any) -> dict[str, Any]:
    """A dispute as parties and arbiters see it."""
    return {
        "escrow_id": row.escrow_id,
        "number": row.number,
        "status": row.status,
        "from_agent_id": row.buyer,
        "to_agent_id": row.provider,
        "milestone": row.milestone or None,
        "opened_by": row.opener,
        "reason": row.reason,
        "amount": display(row.amount),
        "opened_at": row.opened_at,
        "deadline": row.deadline,
        "to_provider": display(row.to_provider),
        "to_buyer": display(row.to_buyer),
        "decided_at": row.decided_at,
    }


async def pass_time(tx: Transaction, agreement: Agreement, now: int, since: int = 0) -> Agreement:
    """Does everything that time has done to a manual escrow by now, each at its nominal second.

    Nothing counts before `since`, nor before an outage is long over (T5), nor before what a dispute
    has kept it waiting for.
    """
    since = effective_deadline(since, tx.service.up_since)
    if now < since:
        return agreement
    with tx.by_time():
        while (timer := step.next_timer(agreement)) is not None and timer[0] <= now:
            after, event, when = manual.pass_time(agreement)
            since = max(since, when)
            agreement = await keep(tx, agreement, after, event, effective_at=since)
    return agreement

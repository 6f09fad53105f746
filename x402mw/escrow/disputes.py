"""Disputes of manual escrows: opened by a party, decided by an arbiter, or by time.

`docs/disputes.md` is the playbook. Rules: `rules/manual.py` and `docs/money.md` 5.
"""

from typing import Any

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.escrow import agents, agreements, deadlines, manual_bodies, schema
from x402mw.escrow.access import ARBITER, Principal
from x402mw.escrow.errors import Refused, not_found
from x402mw.escrow.facts import hash_content
from x402mw.escrow.manual import Answer, find_part, keep, load, show
from x402mw.escrow.rows import find_escrow
from x402mw.escrow.rules import dispute as rules
from x402mw.escrow.rules import money
from x402mw.escrow.rules.agreement import Agreement
from x402mw.escrow.rules.table import Event, InvalidState
from x402mw.escrow.rules.values import MANUAL
from x402mw.escrow.transactions import Transaction

DISPUTE_SECONDS = 7 * 24 * 60 * 60
EVIDENCE_MAX = 50
"""How many statements each party may make: neither can silence the other."""

WITHDRAWN_MAX = 3


async def dispute(
    tx: Transaction, caller: str, escrow_id: str, wish: manual_bodies.NewDispute
) -> Answer:
    """Holds an amount back until an arbiter decides."""
    before = await load(tx, caller, escrow_id)
    part = None if wish.milestone is None else find_part(before, wish.milestone).number
    after = rules.open_dispute(
        before,
        caller,
        number=await agreements.count_disputes(tx.connection, escrow_id) + 1,
        part=part,
        amount=wish.amount,
        now=tx.now,
        deadline=tx.now + DISPUTE_SECONDS,
    )
    await _check_withdrawn(tx, after)
    number = 0 if after.dispute is None else after.dispute.number
    said = _say_evidence(number, 1, wish.evidence) if wish.evidence else None
    answer = await keep(tx, before, after, Event.DISPUTE, reason=wish.reason, evidence=said)
    if wish.evidence:
        await _write_evidence(tx, caller, escrow_id, (number, 1), wish.evidence)
    return answer


async def _check_withdrawn(tx: Transaction, agreement: Agreement) -> None:
    """A dispute stops a review; opened and withdrawn again and again it would stop it for ever."""
    opened = agreement.dispute
    if opened is None or opened.raised:
        return
    withdrawn = await agreements.count_withdrawn(tx.connection, agreement.escrow.escrow_id, opened)
    if withdrawn >= WITHDRAWN_MAX:
        detail = f"you have withdrawn {withdrawn} disputes over the same"
        raise Refused(409, "withdrawn_too_often", detail)


async def add_evidence(
    tx: Transaction, caller: str, escrow_id: str, wish: manual_bodies.Evidence
) -> Answer:
    """Adds what a party has to say to the open dispute."""
    before = await load(tx, caller, escrow_id)
    rules.check_evidence(before)
    if before.dispute is None:
        raise InvalidState(before.escrow.status, Event.EVIDENCE)
    number = before.dispute.number
    line = await _next_line(tx, caller, escrow_id, number)
    await _write_evidence(tx, caller, escrow_id, (number, line), wish.content)
    said = _say_evidence(number, line, wish.content)
    kept = await agreements.keep(tx, before, before, Event.EVIDENCE, evidence=said)
    return await show(tx.connection, kept.escrow, kept)


async def _next_line(tx: Transaction, caller: str, escrow_id: str, number: int) -> int:
    evidence = schema.evidence.c
    mine = func.count().filter(evidence.agent_id == caller)
    query = select(func.count(), mine).where(
        evidence.escrow_id == escrow_id, evidence.number == number
    )
    lines, own = (await tx.connection.execute(query)).one()
    if own >= EVIDENCE_MAX:
        detail = f"a party makes {EVIDENCE_MAX} statements in a dispute"
        raise Refused(409, "too_much_evidence", detail)
    return int(lines) + 1


def _say_evidence(number: int, line: int, content: str) -> dict[str, Any]:
    """What an entry says of a statement: enough to prove what was said, and no more."""
    return {"number": number, "line": line, "sha256": hash_content(content)}


async def _write_evidence(
    tx: Transaction, caller: str, escrow_id: str, place: tuple[int, int], content: str
) -> None:
    number, line = place
    await tx.insert(
        schema.evidence,
        {
            "escrow_id": escrow_id,
            "number": number,
            "line": line,
            "agent_id": caller,
            "content": content,
            "created_at": tx.now,
        },
    )


async def withdraw(tx: Transaction, caller: str, escrow_id: str) -> Answer:
    """Takes a dispute back; only who opened it may, and none that both parties want."""
    before = await load(tx, caller, escrow_id)
    opened = before.dispute
    if opened is not None and opened.raised:
        raise Refused(403, "not_the_opener", "both parties dispute this, so neither takes it back")
    after = rules.withdraw(before, tx.now)
    if opened is not None and opened.opener != caller:
        raise Refused(403, "not_the_opener", "only the party that opened the dispute may do that")
    return await keep(tx, before, after, Event.WITHDRAW)


async def resolve(
    tx: Transaction, arbiter: str, escrow_id: str, wish: manual_bodies.Decision
) -> Answer:
    """Decides a dispute; the arbiter neither pays nor earns by it."""
    await deadlines.apply_to_one(tx, escrow_id)
    escrow = await find_escrow(tx.connection, escrow_id)
    if escrow is None or escrow.kind != MANUAL:
        raise not_found()
    if await agents.asset_of(tx, arbiter) != escrow.asset:
        # An arbiter of test money does not know of live money, nor the other way round.
        raise not_found()
    payees = [payee for payee, _ in money.read_payees(escrow.payees)]
    if arbiter in (escrow.buyer, escrow.provider, escrow.referrer, *payees):
        raise Refused(403, "arbiter_is_party", "an arbiter decides between others")
    before = await agreements.load(tx.connection, escrow)
    after = rules.resolve(before, wish.to_provider, wish.to_buyer, tx.now)
    return await keep(tx, before, after, Event.RESOLVE, reason=wish.reason, arbiter=arbiter)


async def show_all(
    connection: AsyncConnection, *, asset: str, now: int, limit: int, after: tuple[int, str] | None
) -> Answer:
    """A page of disputes over an asset that its arbiters can still decide, oldest first."""
    passed = await deadlines.passed(connection, now)
    rows = await agreements.open_disputes(
        connection, asset=asset, passed=passed, limit=limit + 1, after=after
    )
    last = rows[limit - 1] if len(rows) > limit else None
    return {
        "items": [agreements.describe_dispute(row) for row in rows[:limit]],
        "next": None if last is None else f"{last.entry}.{last.escrow_id}",
    }


async def show_of(
    connection: AsyncConnection,
    caller: Principal,
    escrow_id: str,
    *,
    asset: str,
    limit: int,
    after: int | None,
) -> Answer:
    """A page of an escrow's disputes, newest first: what was said, and the escrow as it is.

    For its parties, and for arbiters of its asset if it was ever disputed.
    """
    escrow = await find_escrow(connection, escrow_id)
    if escrow is None:
        raise not_found()
    rows = await agreements.disputes_of(connection, escrow_id, limit=limit + 1, after=after)
    judges = ARBITER in caller.scopes and escrow.asset == asset and bool(rows)
    if caller.agent_id not in (escrow.buyer, escrow.provider) and not judges:
        raise not_found()
    said = await agreements.evidence_of(connection, escrow_id, [row.number for row in rows[:limit]])
    agreement = await show(connection, escrow)
    items = [
        {
            **agreements.describe_dispute(row),
            "evidence": said.get(row.number, []),
            "agreement": agreement,
        }
        for row in rows[:limit]
    ]
    return {"items": items, "next": str(items[-1]["number"]) if len(rows) > limit else None}

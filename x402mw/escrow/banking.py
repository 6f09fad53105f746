"""What the operator books for the world outside: deposits, withdrawals, fees, each bank line once.

A real rail comes later; until then somebody reads a bank statement and says so here.
"""

from typing import Any

from sqlalchemy import select

from x402mw.core.amounts import Atomic, display
from x402mw.escrow import agents, deadlines, modes, schema
from x402mw.escrow.errors import Refused
from x402mw.escrow.rows import balance_of
from x402mw.escrow.rules.values import Transfer
from x402mw.escrow.transactions import Transaction

DEPOSIT, WITHDRAWAL, FEES = "deposit", "withdrawal", "fees"


async def book(
    tx: Transaction, operator: str, kind: str, agent_id: str, amount: Atomic, reference: str
) -> dict[str, Any]:
    """Books one line of a bank, named by a reference that no other line has."""
    await _check_new(tx, reference)
    move = agents.deposit if kind == DEPOSIT else agents.withdraw
    answer = await move(tx, agent_id, amount, actor=operator, data={"reference": reference})
    row = {"reference": reference, "kind": kind, "agent_id": agent_id, "created_at": tx.now}
    await tx.insert(schema.bookings, {**row, "amount": amount, "operator": operator})
    return {**row, "amount": display(amount), "balance": answer["balance"]}


async def book_fees(
    tx: Transaction, operator: str, amount: Atomic, reference: str
) -> dict[str, Any]:
    """Books fees that the operator paid out to itself; those of test money are worth nothing."""
    if amount == 0:
        raise Refused(422, "invalid_request", "an amount of 0 moves nothing")
    await _check_new(tx, reference)
    # What the fees come to must not depend on whether a sweeper has come by (T2).
    await deadlines.apply(tx, at=deadlines.last_alive(tx))
    asset = tx.settings.asset.code
    house = modes.house(asset)
    left = await balance_of(tx.connection, house) - amount
    if left < 0:
        available = display(Atomic(left + amount))
        detail = f"the fees come to {available}"
        raise Refused(409, "not_covered", detail, available=available)
    data = {"reference": reference}
    tx.post(FEES, [Transfer(house, modes.world(asset), amount)], asset, actor=operator, data=data)
    row = {"reference": reference, "kind": FEES, "agent_id": None, "created_at": tx.now}
    await tx.insert(schema.bookings, {**row, "amount": amount, "operator": operator})
    return {**row, "amount": display(amount), "balance": display(Atomic(left))}


async def _check_new(tx: Transaction, reference: str) -> None:
    bookings = schema.bookings.c
    taken = select(bookings.reference).where(bookings.reference == reference)
    if (await tx.connection.execute(taken)).first() is not None:
        raise Refused(409, "reference_taken", "a line with this reference was booked before")

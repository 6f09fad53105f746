"""What the operator books for the world outside: deposits and withdrawals, each bank line once.

A real rail comes later; until then somebody reads a bank statement and says so here.
"""

from typing import Any

from sqlalchemy import select

from x402mw.core.amounts import Atomic, display
from x402mw.escrow import agents, schema
from x402mw.escrow.errors import Refused
from x402mw.escrow.transactions import Transaction

DEPOSIT, WITHDRAWAL = "deposit", "withdrawal"


async def book(
    tx: Transaction, operator: str, kind: str, agent_id: str, amount: Atomic, reference: str
) -> dict[str, Any]:
    """Books one line of a bank, named by a reference that no other line has."""
    bookings = schema.bookings
    taken = select(bookings.c.reference).where(bookings.c.reference == reference)
    if (await tx.connection.execute(taken)).first() is not None:
        raise Refused(409, "reference_taken", "a line with this reference was booked before")
    move = agents.deposit if kind == DEPOSIT else agents.withdraw
    answer = await move(tx, agent_id, amount)
    row = {"reference": reference, "kind": kind, "agent_id": agent_id, "created_at": tx.now}
    await tx.insert(bookings, {**row, "amount": amount, "operator": operator})
    return {**row, "amount": display(amount), "balance": answer["balance"]}

"""Transfers: one agent pays another at once, without an escrow and without a fee (E21)."""

import secrets
from operator import itemgetter
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.core import ids
from x402mw.core.amounts import display
from x402mw.escrow import agents, modes, schema
from x402mw.escrow.account_bodies import NewTransfer
from x402mw.escrow.errors import Refused, not_found
from x402mw.escrow.rules.values import Transfer, agent_account
from x402mw.escrow.transactions import Transaction

TRANSFER = "tr_"
_TRANSFERS = schema.transfers.c


async def send(tx: Transaction, sender: str, wish: NewTransfer) -> dict[str, Any]:
    """Moves money from one agent to another; it cannot be taken back."""
    recipient = wish.to_agent_id
    if recipient == sender:
        raise Refused(422, "self_payment", "sender and recipient must be two agents")
    asset = await agents.meet(tx, sender, recipient)
    await agents.check_funds(tx, sender, wish.amount)
    moves = [Transfer(agent_account(sender), agent_account(recipient), wish.amount)]
    transfer_id = ids.format_id(TRANSFER, secrets.token_bytes(ids.ID_BYTES))
    data = {"transfer_id": transfer_id, "memo": wish.memo}
    tx.post("transfer", moves, asset, data=data)
    row = {
        "transfer_id": transfer_id,
        "sender": sender,
        "recipient": recipient,
        "asset": asset,
        "memo": wish.memo,
        "amount": wish.amount,
        # The number of its entry in the books, which orders them.
        "number": tx.service.entry_seq,
        "created_at": tx.now,
    }
    await tx.insert(schema.transfers, row)
    return _describe(row)


def _describe(row: Any) -> dict[str, Any]:
    return {
        "transfer_id": row["transfer_id"],
        "from_agent_id": row["sender"],
        "to_agent_id": row["recipient"],
        "asset": modes.shown(row["asset"]),
        "mode": modes.mode_of(row["asset"]),
        "amount": display(row["amount"]),
        "memo": row["memo"],
        "created_at": row["created_at"],
    }


async def show(connection: AsyncConnection, caller: str, transfer_id: str) -> dict[str, Any]:
    """One transfer, for its two parties."""
    query = select(schema.transfers).where(_TRANSFERS.transfer_id == transfer_id)
    row = (await connection.execute(query)).mappings().one_or_none()
    if row is None or caller not in (row["sender"], row["recipient"]):
        raise not_found()
    return _describe(row)


async def show_all(
    connection: AsyncConnection, caller: str, *, role: str | None, limit: int, after: int | None
) -> dict[str, Any]:
    """A page of the caller's transfers, newest first; `next` is the `after` of the next page."""
    parties = {"sender": _TRANSFERS.sender == caller, "recipient": _TRANSFERS.recipient == caller}
    query = select(schema.transfers)
    if after is not None:
        query = query.where(_TRANSFERS.number < after)
    query = query.order_by(_TRANSFERS.number.desc()).limit(limit + 1)
    found: list[Any] = []
    # One by one, as each has an index that is in order: together they would sort all there are.
    for name in (role,) if role else parties:
        found += (await connection.execute(query.where(parties[name]))).mappings()
    found = sorted(found, key=itemgetter("number"), reverse=True)[: limit + 1]
    page = found[:limit]
    more = str(page[-1]["number"]) if len(found) > limit else None
    return {"items": [_describe(row) for row in page], "next": more}

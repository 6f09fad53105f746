"""What becomes of webhooks when the key that made them, or their agent, comes to its end."""

from sqlalchemy import delete, update

from x402mw.escrow import schema
from x402mw.escrow.transactions import Transaction

_HOOKS = schema.webhooks


async def end_of_key(tx: Transaction, key_id: str) -> None:
    """Ends what a dead key made, at once: who had it may have been a thief."""
    await tx.connection.execute(delete(_HOOKS).where(_HOOKS.c.key_id == key_id))


async def hand_on(tx: Transaction, key_id: str, successor: str) -> None:
    """Gives what a key made to the one that replaces it."""
    theirs = update(_HOOKS).where(_HOOKS.c.key_id == key_id)
    await tx.connection.execute(theirs.values(key_id=successor))


async def end_of_agent(tx: Transaction, agent_id: str) -> None:
    """Lets an agent's webhooks tell what happened up to now, and no more."""
    live = update(_HOOKS).where(_HOOKS.c.agent_id == agent_id, _HOOKS.c.last_entry.is_(None))
    await tx.connection.execute(live.values(last_entry=tx.service.entry_seq))

"""What a tenant's admin sees and does: agents and escrows of its own tenant, and of no other."""

from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.escrow import agents, schema, sessions
from x402mw.escrow.access import Principal
from x402mw.escrow.errors import not_found
from x402mw.escrow.rows import find_escrow
from x402mw.escrow.rules.values import Escrow
from x402mw.escrow.transactions import Transaction

_AGENTS = schema.agents.c


async def show_agents(
    connection: AsyncConnection, admin: Principal, *, limit: int, after: str | None
) -> dict[str, Any]:
    """A page of the tenant's agents, by their ids; `next` is the `after` of the next page."""
    query = agents.WITH_BALANCES.where(
        _AGENTS.tenant == admin.tenant, _AGENTS.agent_id > (after or "")
    )
    query = query.order_by(_AGENTS.agent_id).limit(limit + 1)
    found = (await connection.execute(query)).all()
    items = [agents.summarize(row) for row in found[:limit]]
    return {"items": items, "next": items[-1]["agent_id"] if len(found) > limit else None}


async def check_agent(connection: AsyncConnection, admin: Principal, agent_id: str) -> None:
    """Refuses agents of other tenants as if there were none."""
    query = select(_AGENTS.agent_id).where(
        _AGENTS.agent_id == agent_id, _AGENTS.tenant == admin.tenant
    )
    if (await connection.execute(query)).first() is None:
        raise not_found()


async def find_tenant_escrow(
    connection: AsyncConnection, admin: Principal, escrow_id: str
) -> Escrow:
    """An escrow that an agent of the tenant is a party of."""
    escrow = await find_escrow(connection, escrow_id)
    if escrow is None:
        raise not_found()
    parties = _AGENTS.agent_id.in_([escrow.buyer, escrow.provider])
    query = select(_AGENTS.agent_id).where(parties, _AGENTS.tenant == admin.tenant)
    if (await connection.execute(query)).first() is None:
        raise not_found()
    return escrow


async def revoke_agent(tx: Transaction, admin: Principal, agent_id: str) -> dict[str, Any]:
    """Ends an agent of the tenant."""
    await check_agent(tx.connection, admin, agent_id)
    return await sessions.revoke_agent(tx, agent_id, admin.agent_id)

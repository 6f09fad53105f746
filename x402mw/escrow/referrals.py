"""Referrals: who introduced whom, and who gets a part of an escrow's fee.

A referral code is an agent's id, or its handle within the tenant: both are known to those it deals
with, and a code gives its holder nothing but income.
"""

from collections.abc import Collection
from typing import Any

from sqlalchemy import bindparam, select
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.core import ids
from x402mw.escrow import schema
from x402mw.escrow.errors import Refused
from x402mw.escrow.transactions import Transaction

_AGENTS = schema.agents.c

# Made once: to build a statement costs more than to run it.
_BOTH = (
    select(_AGENTS.agent_id, _AGENTS.tenant, _AGENTS.referrer, schema.tenants.c.mode)
    .join(schema.tenants, schema.tenants.c.tenant == _AGENTS.tenant)
    .where(_AGENTS.agent_id.in_([bindparam("buyer"), bindparam("provider")]))
)


async def find_by_handle(connection: AsyncConnection, tenant: str, handle: str) -> Any:
    """The row of a tenant's agent with this handle, or None."""
    query = select(schema.agents).where(_AGENTS.tenant == tenant, _AGENTS.handle == handle)
    return (await connection.execute(query)).one_or_none()


async def find(tx: Transaction, code: str, tenant: str, mode: str) -> str:
    """The agent behind a code, or a refusal. Only agents of the same mode can refer."""
    query = select(_AGENTS.agent_id).join(schema.tenants, schema.tenants.c.tenant == _AGENTS.tenant)
    query = query.where(schema.tenants.c.mode == mode, _AGENTS.revoked_at.is_(None))
    if code.startswith(ids.AGENT):
        query = query.where(_AGENTS.agent_id == code)
    else:
        query = query.where(_AGENTS.tenant == tenant, _AGENTS.handle == code)
    found = (await tx.connection.execute(query)).scalar_one_or_none()
    if found is None:
        raise Refused(404, "unknown_referral_code", "no agent here has this referral code")
    return str(found)


async def referrer_of(
    tx: Transaction, code: str | None, buyer: str, provider: str, payees: Collection[str] = ()
) -> str:
    """Who gets a part of the fees of an escrow: one agent, which is no party to it, or ''.

    An explicit code, else the buyer's referrer, else the provider's (X21). Who has a share of the
    revenue is a party too.
    """
    rows = await tx.connection.execute(_BOTH, {"buyer": buyer, "provider": provider})
    parties = {row.agent_id: row for row in rows}
    if code is not None:
        referrer = await find(tx, code, parties[buyer].tenant, parties[buyer].mode)
        if referrer in parties or referrer in payees:
            raise Refused(422, "self_referral", "a party to the escrow cannot be its referrer")
        return referrer
    for party in (buyer, provider):
        referrer = parties[party].referrer
        if referrer is None or referrer in parties or referrer in payees:
            continue
        if await _is_live(tx, referrer):
            return str(referrer)
    return ""


async def _is_live(tx: Transaction, agent_id: str) -> bool:
    query = select(_AGENTS.agent_id).where(
        _AGENTS.agent_id == agent_id, _AGENTS.revoked_at.is_(None)
    )
    return (await tx.connection.execute(query)).first() is not None

"""Tenants: who runs agents here, live or test.

Agents that register by themselves are the public tenants'. A tenant of one's own sees its agents
through its admin keys; the operator's own tenant also books money in and out.
"""

import re
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.escrow import schema
from x402mw.escrow.bodies import HANDLE_FORM
from x402mw.escrow.errors import Refused
from x402mw.escrow.transactions import OPERATOR, Transaction

_NAME = re.compile(HANDLE_FORM, re.ASCII)


async def create(tx: Transaction, tenant: str, mode: str) -> dict[str, Any]:
    """Makes a tenant; its name is unique and stays."""
    if not _NAME.fullmatch(tenant):
        raise Refused(422, "invalid_request", "a tenant is named by 3 to 40 of a-z, 0-9 and -")
    if await find_mode(tx.connection, tenant) is not None:
        raise Refused(409, "tenant_taken", f"there is a tenant {tenant} already")
    await tx.insert(schema.tenants, {"tenant": tenant, "mode": mode, "created_at": tx.now})
    tx.note("tenant_created", actor=OPERATOR, data={"tenant": tenant, "mode": mode})
    return {"tenant": tenant, "mode": mode, "created_at": tx.now}


async def find_mode(connection: AsyncConnection, tenant: str) -> str | None:
    """Whether a tenant is live or test; None if there is no such tenant."""
    query = select(schema.tenants.c.mode).where(schema.tenants.c.tenant == tenant)
    return (await connection.execute(query)).scalar_one_or_none()

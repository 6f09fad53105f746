"""Routes for those who run agents here: a tenant's admin, and the operator with its bank."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from x402mw.core import ids
from x402mw.core.errors import Malformed
from x402mw.escrow import admin, banking, bodies, sessions, web
from x402mw.escrow.access import ADMIN
from x402mw.escrow.account_bodies import NewBooking
from x402mw.escrow.api.shared import (
    PAGE_ITEMS,
    PAGE_ITEMS_MAX,
    Routes,
    change,
    find_ledger,
    find_principal,
    path_id,
)
from x402mw.escrow.errors import Refused
from x402mw.escrow.tenants import OPERATORS
from x402mw.escrow.transactions import Transaction


async def list_agents(request: Request) -> Response:
    """GET /admin/agents."""
    limit = web.query_number(request, "limit", PAGE_ITEMS, PAGE_ITEMS_MAX)
    after = _query_agent(request, "after")
    async with find_ledger(request).read() as connection:
        page = await admin.show_agents(
            connection, find_principal(request), limit=max(limit, 1), after=after
        )
    return JSONResponse(page)


async def list_escrows(request: Request) -> Response:
    """GET /admin/escrow: those of one agent, so that a page costs the same for any tenant."""
    agent_id = _query_agent(request, "agent_id")
    if agent_id is None:
        raise Refused(422, "invalid_request", "agent_id: name an agent of your tenant")
    limit = web.query_number(request, "limit", PAGE_ITEMS, PAGE_ITEMS_MAX)
    after = web.query_number(request, "after", 0) or None
    ledger = find_ledger(request)
    async with ledger.read() as connection:
        await admin.check_agent(connection, find_principal(request), agent_id)
    await ledger.refresh(agent_id)
    async with ledger.read() as connection:
        page = await sessions.show_all(
            connection, agent_id, role=None, status=None, limit=max(limit, 1), after=after
        )
    return JSONResponse(page)


async def show_escrow(request: Request) -> Response:
    """GET /admin/escrow/{id}."""
    escrow_id = path_id(request, "escrow_id", ids.ESCROW)
    principal, ledger = find_principal(request), find_ledger(request)
    async with ledger.read() as connection:
        escrow = await admin.find_tenant_escrow(connection, principal, escrow_id)
    await ledger.refresh(escrow.buyer)
    async with ledger.read() as connection:
        escrow = await admin.find_tenant_escrow(connection, principal, escrow_id)
    return JSONResponse(sessions.describe(escrow))


async def revoke_agent(request: Request) -> Response:
    """POST /admin/agents/{id}/revoke."""
    principal, agent_id = find_principal(request), path_id(request, "agent_id", ids.AGENT)

    async def revoke(tx: Transaction, _caller: str, _body: bodies.Body) -> dict[str, Any]:
        return await admin.revoke_agent(tx, principal, agent_id)

    return await change(request, bodies.Body, revoke)


async def book_deposit(request: Request) -> Response:
    """POST /operator/deposits."""
    return await _book(request, banking.DEPOSIT)


async def book_withdrawal(request: Request) -> Response:
    """POST /operator/withdrawals."""
    return await _book(request, banking.WITHDRAWAL)


async def _book(request: Request, kind: str) -> Response:
    if find_principal(request).tenant != OPERATORS:
        raise Refused(403, "not_the_operator", "only the operator of this escrow may do that")

    async def book(tx: Transaction, caller: str, body: NewBooking) -> dict[str, Any]:
        return await banking.book(
            tx, caller, kind, agent_id=body.agent_id, amount=body.amount, reference=body.reference
        )

    return await change(request, NewBooking, book, status=201)


def _query_agent(request: Request, name: str) -> str | None:
    text = request.query_params.get(name)
    if text is None:
        return None
    try:
        ids.parse_id(ids.AGENT, text)
    except Malformed as error:
        raise Refused(422, "invalid_request", f"{name}: {error}") from None
    return text


ROUTES: Routes = (
    ("GET", "/admin/agents", ADMIN, list_agents),
    ("POST", "/admin/agents/{agent_id}/revoke", ADMIN, revoke_agent),
    ("GET", "/admin/escrow", ADMIN, list_escrows),
    ("GET", "/admin/escrow/{escrow_id}", ADMIN, show_escrow),
    ("POST", "/operator/deposits", ADMIN, book_deposit),
    ("POST", "/operator/withdrawals", ADMIN, book_withdrawal),
)

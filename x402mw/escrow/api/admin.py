"""Routes for those who run agents here: a tenant's admin, and the operator with its bank."""

from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from x402mw.core import ids
from x402mw.core.strict import dumps
from x402mw.escrow import admin, banking, bodies, sessions
from x402mw.escrow.access import ADMIN
from x402mw.escrow.account_bodies import NewBooking, NewFees
from x402mw.escrow.api import account_answers, answers
from x402mw.escrow.api.queries import AgentPage, TenantEscrowPage
from x402mw.escrow.api.routes import Route, Routes
from x402mw.escrow.api.shared import (
    change,
    find_ledger,
    find_principal,
    find_query,
    path_id,
    respond,
)
from x402mw.escrow.errors import Refused
from x402mw.escrow.idempotency import Answer
from x402mw.escrow.rules.values import Escrow
from x402mw.escrow.transactions import OPERATOR, Transaction


async def list_agents(request: Request) -> Response:
    """GET /admin/agents."""
    query = find_query(request, AgentPage)
    principal = find_principal(request)
    page = await find_ledger(request).read(
        lambda db: admin.show_agents(db, principal, limit=query.limit, after=query.after)
    )
    return JSONResponse(page)


async def list_tenant_escrows(request: Request) -> Response:
    """GET /admin/escrow: those of one agent, so that a page costs the same for any tenant."""
    query, ledger = find_query(request, TenantEscrowPage), find_ledger(request)
    principal, agent_id = find_principal(request), query.agent_id

    async def show(connection: AsyncConnection) -> dict[str, Any]:
        await admin.check_agent(connection, principal, agent_id)
        return await sessions.show_all(
            connection, agent_id, role=None, status=None, limit=query.limit, after=query.after
        )

    page = await ledger.read_of(agent_id, show)
    return respond(request, Answer(200, dumps(page).decode()))


async def show_tenant_escrow(request: Request) -> Response:
    """GET /admin/escrow/{id}."""
    escrow_id = path_id(request, "escrow_id", ids.ESCROW)
    principal, ledger = find_principal(request), find_ledger(request)

    async def find(connection: AsyncConnection) -> Escrow:
        return await admin.find_tenant_escrow(connection, principal, escrow_id)

    buyer = (await ledger.read(find)).buyer
    shown = sessions.describe(await ledger.read_of(buyer, find))
    return respond(request, Answer(200, dumps(shown).decode()))


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


async def book_fees(request: Request) -> Response:
    """POST /operator/fees."""
    _check_operator(request)
    # As many in each transaction as others can wait for.
    await find_ledger(request).apply_all()

    async def book(tx: Transaction, caller: str, body: NewFees) -> dict[str, Any]:
        return await banking.book_fees(tx, caller, body.amount, body.reference)

    return await change(request, NewFees, book, status=201)


def _check_operator(request: Request) -> None:
    if find_principal(request).tenant != OPERATOR:
        raise Refused(403, "not_the_operator", "only the operator of this escrow may do that")


async def _book(request: Request, kind: str) -> Response:
    _check_operator(request)

    async def book(tx: Transaction, caller: str, body: NewBooking) -> dict[str, Any]:
        return await banking.book(
            tx, caller, kind, agent_id=body.agent_id, amount=body.amount, reference=body.reference
        )

    return await change(request, NewBooking, book, status=201)


_BOOKING = "not_the_operator unknown_agent reference_taken"

ROUTES: Routes = (
    Route(
        *("GET", "/admin/agents", ADMIN, list_agents),
        "Lists the agents of your tenant.",
        account_answers.Agents,
        query=AgentPage,
    ),
    Route(
        *("POST", "/admin/agents/{agent_id}/revoke", ADMIN, revoke_agent),
        "Ends an agent of your tenant: its keys die, its open sessions close.",
        account_answers.RevokedAgent,
        bodies.Body,
    ),
    Route(
        *("GET", "/admin/escrow", ADMIN, list_tenant_escrows),
        "Lists the escrows of one agent of your tenant.",
        answers.Escrows,
        query=TenantEscrowPage,
        refusals="not_found",
    ),
    Route(
        *("GET", "/admin/escrow/{escrow_id}", ADMIN, show_tenant_escrow),
        "Shows an escrow that an agent of your tenant is a party of.",
        answers.Escrow,
    ),
    Route(
        *("POST", "/operator/deposits", ADMIN, book_deposit),
        "Books money that the operator received for an agent.",
        account_answers.Booking,
        NewBooking,
        status=201,
        refusals=f"{_BOOKING} amount_out_of_range",
    ),
    Route(
        *("POST", "/operator/withdrawals", ADMIN, book_withdrawal),
        "Books money that the operator paid out to an agent.",
        account_answers.Booking,
        NewBooking,
        status=201,
        refusals=f"{_BOOKING} insufficient_funds",
    ),
    Route(
        *("POST", "/operator/fees", ADMIN, book_fees),
        "Books fees that the operator paid out to itself.",
        account_answers.Booking,
        NewFees,
        status=201,
        refusals="not_the_operator reference_taken not_covered",
    ),
)

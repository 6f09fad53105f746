"""Routes about agents: registration, balance, faucet and journals."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from x402mw.core import ids
from x402mw.escrow import agents, bodies, web
from x402mw.escrow.api.shared import Routes, change, find_caller, find_ledger, path_id
from x402mw.escrow.transactions import Transaction


async def register_agent(request: Request) -> Response:
    """POST /agents."""
    body = web.parse(bodies.NewAgent, await web.read_body(request))
    answer = await find_ledger(request).perform(
        lambda tx: agents.register(tx, body.name), caller=None, status=201
    )
    return web.respond(answer)


async def show_agent(request: Request) -> Response:
    """GET /agents/me."""
    caller, ledger = await find_caller(request), find_ledger(request)
    await ledger.refresh(caller)
    async with ledger.read() as connection:
        return JSONResponse(await agents.describe(connection, caller))


async def claim_faucet(request: Request) -> Response:
    """POST /faucet/claim."""
    source = agents.claim_source(request.client.host if request.client else None)

    async def claim(tx: Transaction, caller: str, _body: bodies.Body) -> dict[str, Any]:
        return await agents.claim_faucet(tx, caller, source)

    return await change(request, bodies.Body, claim)


async def register_journal(request: Request) -> Response:
    """PUT /journals/{id}."""
    journal = path_id(request, "journal", ids.JOURNAL)

    async def register(tx: Transaction, caller: str, body: bodies.NewJournal) -> dict[str, Any]:
        return await agents.register_journal(tx, caller, journal, body.receipt_key)

    return await change(request, bodies.NewJournal, register)


ROUTES: Routes = (
    ("POST", "/agents", register_agent),
    ("GET", "/agents/me", show_agent),
    ("POST", "/faucet/claim", claim_faucet),
    ("PUT", "/journals/{journal}", register_journal),
)

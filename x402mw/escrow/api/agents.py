"""Routes about agents: registration, balance, faucet and journals."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from x402mw.core import ids
from x402mw.escrow import access, agents, bodies, sessions, web
from x402mw.escrow.access import PROVIDE, READ, SPEND
from x402mw.escrow.account_bodies import NewAgent, is_handle
from x402mw.escrow.api import account_answers as answers
from x402mw.escrow.api.routes import OPEN, Route, Routes
from x402mw.escrow.api.shared import (
    authenticate,
    change,
    find_caller,
    find_ledger,
    find_principal,
    path_id,
)
from x402mw.escrow.errors import Refused, not_found
from x402mw.escrow.modes import LIVE, PUBLIC
from x402mw.escrow.referrals import find_by_handle
from x402mw.escrow.transactions import Transaction


async def register_agent(request: Request) -> Response:
    """POST /agents. Its answer holds a secret, so it is never stored for another try."""
    body = web.parse(NewAgent, await web.read_body(request))
    tenant, key_id = await _find_tenant(request, body)

    async def register(tx: Transaction) -> dict[str, Any]:
        return await agents.register(
            tx, body.name, tenant=tenant, handle=body.handle, referral_code=body.referral_code
        )

    answer = await find_ledger(request).perform(register, caller=None, key_id=key_id, status=201)
    return web.respond(answer)


async def _find_tenant(request: Request, body: NewAgent) -> tuple[str, str | None]:
    """The public tenant of the mode wished for, or that of the admin who asks, and by which key."""
    if "authorization" not in request.headers:
        return PUBLIC[body.mode or LIVE], None
    admin = await authenticate(request)
    if access.ADMIN not in admin.scopes:
        raise access.lacking([access.ADMIN])
    if body.mode not in (None, admin.mode):
        raise Refused(409, "mode_mismatch", f"your tenant is {admin.mode}")
    return admin.tenant, admin.key_id


async def show_agent(request: Request) -> Response:
    """GET /agents/me."""
    caller, ledger = find_caller(request), find_ledger(request)
    shown = await ledger.read_of(caller, lambda db: agents.describe(db, caller, ledger.now()))
    return JSONResponse(shown)


async def show_handle(request: Request) -> Response:
    """GET /handles/{handle}: which agent of the caller's tenant is called so."""
    tenant = find_principal(request).tenant
    handle = request.path_params["handle"]
    if not is_handle(handle):
        # A database may fail on what no handle has, such as NUL.
        raise not_found()
    row = await find_ledger(request).read(lambda db: find_by_handle(db, tenant, handle))
    if row is None:
        raise not_found()
    return JSONResponse({"agent_id": row.agent_id, "handle": row.handle, "name": row.name})


async def revoke_itself(request: Request) -> Response:
    """POST /agents/me/revoke."""
    asker = find_principal(request)

    async def revoke(tx: Transaction, caller: str, _body: bodies.Body) -> dict[str, Any]:
        await access.check_whole(tx, asker)
        return await sessions.revoke_agent(tx, caller, caller)

    return await change(request, bodies.Body, revoke)


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


async def show_stats(request: Request) -> Response:
    """GET /stats: figures for everybody."""
    return JSONResponse(await find_ledger(request).stats.show())


ROUTES: Routes = (
    Route(
        *("GET", "/stats", OPEN, show_stats),
        "Shows the terms of this escrow, and figures about it.",
        answers.Stats,
    ),
    Route(
        *("POST", "/agents", OPEN, register_agent),
        "Registers an agent; its first API key is shown this once.",
        answers.MadeAgent,
        NewAgent,
        status=201,
        refusals="unauthorized scope mode_mismatch handle_taken unknown_referral_code",
        keyed=False,
    ),
    Route(
        *("GET", "/agents/me", READ, show_agent),
        "Shows yourself: your balance and your keys.",
        answers.Self,
    ),
    Route(
        *("POST", "/agents/me/revoke", SPEND, revoke_itself),
        "Ends yourself: all your keys die at once, your open sessions close.",
        answers.RevokedAgent,
        bodies.Body,
        refusals="key_ending",
    ),
    Route(
        *("GET", "/handles/{handle}", READ, show_handle),
        "Finds the agent of your tenant that has a handle.",
        answers.Handle,
    ),
    Route(
        *("POST", "/faucet/claim", SPEND, claim_faucet),
        "Takes the first money of a new agent, once.",
        answers.Claimed,
        bodies.Body,
        refusals="faucet_claimed faucet_limit no_faucet agent_revoked amount_out_of_range",
    ),
    Route(
        *("PUT", "/journals/{journal}", PROVIDE, register_journal),
        "Registers a provider's book; the same again changes nothing.",
        answers.Journal,
        bodies.NewJournal,
        refusals="journal_taken",
    ),
)

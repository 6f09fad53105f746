"""Routes about API keys. Their answers hold secrets, so they are never stored for another try."""

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from x402mw.escrow import access, bodies, web
from x402mw.escrow.access import KEY_ID, READ
from x402mw.escrow.account_bodies import NewKey, Rotation
from x402mw.escrow.api import account_answers as answers
from x402mw.escrow.api.routes import Route, Routes
from x402mw.escrow.api.shared import MANAGING, find_ledger, find_principal, path_id, perform
from x402mw.escrow.transactions import Transaction


async def list_keys(request: Request) -> Response:
    """GET /agents/me/keys."""
    ledger, caller = find_ledger(request), find_principal(request).agent_id
    items = await ledger.read(lambda db: access.show_keys(db, caller, ledger.now()))
    return JSONResponse({"items": items})


async def create_key(request: Request) -> Response:
    """POST /agents/me/keys."""
    asker = find_principal(request)

    async def create(tx: Transaction, body: NewKey) -> dict[str, Any]:
        return await access.create_key(tx, asker, body.name, body.scopes)

    return await _secretly(request, NewKey, create, status=201)


async def rotate_key(request: Request) -> Response:
    """POST /agents/me/keys/{key_id}/rotate."""
    asker, key_id = find_principal(request), path_id(request, "key_id", KEY_ID)

    async def rotate(tx: Transaction, body: Rotation) -> dict[str, Any]:
        return await access.rotate_key(tx, asker, key_id, body.grace_seconds)

    return await _secretly(request, Rotation, rotate, status=201)


async def revoke_key(request: Request) -> Response:
    """DELETE /agents/me/keys/{key_id}."""
    asker, key_id = find_principal(request), path_id(request, "key_id", KEY_ID)

    async def revoke(tx: Transaction, _body: bodies.Body) -> dict[str, Any]:
        return await access.revoke_key(tx, asker, key_id)

    return await _secretly(request, bodies.Body, revoke)


async def _secretly(
    request: Request,
    model: type[web.Model],
    operation: Callable[[Transaction, web.Model], Awaitable[dict[str, Any]]],
    *,
    status: int = 200,
) -> Response:
    """Runs an operation whose answer may not be stored."""
    body = web.parse(model, await web.read_body(request))
    return web.respond(await perform(request, lambda tx: operation(tx, body), status=status))


ROUTES: Routes = (
    Route(
        *("GET", "/agents/me/keys", READ, list_keys),
        "Lists your keys that work, without their secrets.",
        answers.Keys,
    ),
    Route(
        *("POST", "/agents/me/keys", MANAGING, create_key),
        "Makes a key that may no more than the one that asks.",
        answers.MadeKey,
        NewKey,
        status=201,
        refusals="too_many_keys key_ending",
        keyed=False,
    ),
    Route(
        *("POST", "/agents/me/keys/{key_id}/rotate", MANAGING, rotate_key),
        "Replaces a key by a new one like it.",
        answers.RotatedKey,
        Rotation,
        status=201,
        refusals="too_many_keys key_ending",
        keyed=False,
    ),
    Route(
        *("DELETE", "/agents/me/keys/{key_id}", MANAGING, revoke_key),
        "Ends a key at once.",
        answers.Key,
        refusals="last_key key_ending",
        keyed=False,
    ),
)

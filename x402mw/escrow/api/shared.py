"""What the routes share: who calls, which ledger, and one operation per idempotency key."""

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from x402mw.core import ids
from x402mw.core.errors import Malformed
from x402mw.escrow import agents, web
from x402mw.escrow.errors import Refused, not_found
from x402mw.escrow.ledger import Ledger
from x402mw.escrow.transactions import Transaction

PAGE_ITEMS = 100
PAGE_ITEMS_MAX = 500
_BEARER = "bearer "
Endpoint = Callable[[Request], Awaitable[Response]]
Routes = tuple[tuple[str, str, Endpoint], ...]
"""(method, path below the base, function) of each route."""


def find_ledger(request: Request) -> Ledger:
    """The ledger of this application."""
    ledger: Ledger = request.app.state.ledger
    return ledger


async def find_caller(request: Request) -> str:
    """The agent whose API key this request carries."""
    header = request.headers.get("authorization", "")
    api_key = header[len(_BEARER) :].strip() if header[: len(_BEARER)].lower() == _BEARER else ""
    async with find_ledger(request).read() as connection:
        agent_id = await agents.find_by_key(connection, api_key)
    if agent_id is None:
        raise Refused(
            401,
            "unauthorized",
            "send Authorization: Bearer and your API key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return agent_id


def path_id(request: Request, name: str, prefix: str) -> str:
    """An id from the path; one that is malformed names nothing."""
    text: str = request.path_params[name]
    try:
        ids.parse_id(prefix, text)
    except Malformed:
        raise not_found() from None
    return text


async def change(
    request: Request,
    model: type[web.Model],
    operation: Callable[[Transaction, str, web.Model], Awaitable[dict[str, Any]]],
    *,
    status: int = 200,
) -> Response:
    """Runs one operation of the caller on a parsed body, once per idempotency key."""
    caller = await find_caller(request)
    value = await web.read_body(request)
    body = web.parse(model, value)
    key = web.idempotency_key(request, caller, value)
    ledger = find_ledger(request)
    answer = await ledger.perform(
        lambda tx: operation(tx, caller, body), caller=caller, key=key, status=status
    )
    return web.respond(answer)

"""What the routes share: who calls and may, which ledger, one operation per idempotency key."""

import re
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from x402mw.core import ids
from x402mw.core.errors import Malformed
from x402mw.escrow import access, web
from x402mw.escrow.access import Principal
from x402mw.escrow.api import answers, dialects
from x402mw.escrow.api.queries import Query, read_query
from x402mw.escrow.api.routes import Endpoint, Route
from x402mw.escrow.errors import Refused, not_found
from x402mw.escrow.idempotency import KEY_CHARACTERS_MAX, Answer, Key, hash_body
from x402mw.escrow.ledger import Ledger, Operation
from x402mw.escrow.rows import find_escrow
from x402mw.escrow.transactions import Transaction

_BEARER = "bearer "
MANAGING = " ".join(scope for scope in access.SCOPES if scope in access.MANAGING)
ON_ESCROW = "invalid_state wrong_kind not_the_buyer"
"""The codes of nearly every operation on an escrow."""

AnyQuery = TypeVar("AnyQuery", bound=Query)
_OF_ROLES = frozenset({access.SPEND, access.PROVIDE})
"""A route with just these is open to either party of its escrow: then each needs its own."""

_PRINCIPAL, _QUERY = "x402mw.principal", "x402mw.query"


def find_ledger(request: Request) -> Ledger:
    """The ledger of this application."""
    ledger: Ledger = request.app.state.ledger
    return ledger


def guard(route: Route) -> Endpoint:
    """Lets only keys with the scopes of a route come to it, and reads its query."""
    needed, also, endpoint = route.scopes.split(), route.also.split(), route.endpoint
    by_role = set(needed) == _OF_ROLES

    @wraps(endpoint)
    async def guarded(request: Request) -> Response:
        if needed:
            principal = await authenticate(request)
            if principal.scopes.isdisjoint(needed):
                raise access.lacking(needed)
            if not principal.scopes.issuperset(also):
                raise access.lacking_all(also)
            if by_role and not principal.scopes >= _OF_ROLES:
                await _check_role(request, principal)
            request.scope[_PRINCIPAL] = principal
        request.scope[_QUERY] = read_query(request, route.query)
        return await endpoint(request)

    return guarded


async def _check_role(request: Request, principal: Principal) -> None:
    """Refuses to act for the buyer without `spend`, and for the provider without `provide`."""
    escrow_id = path_id(request, "escrow_id", ids.ESCROW)
    escrow = await find_ledger(request).read(lambda db: find_escrow(db, escrow_id))
    if escrow is None:
        return
    for party, scope in ((escrow.buyer, access.SPEND), (escrow.provider, access.PROVIDE)):
        if principal.agent_id == party and scope not in principal.scopes:
            raise access.lacking([scope])


async def authenticate(request: Request) -> Principal:
    """Who has the API key that this request carries, whatever it may do."""
    header = request.headers.get("authorization", "")
    api_key = header[len(_BEARER) :].strip() if header[: len(_BEARER)].lower() == _BEARER else ""
    ledger = find_ledger(request)
    principal = await ledger.read(lambda db: access.find_principal(db, api_key, ledger.now()))
    if principal is None:
        raise access.unauthorized()
    return principal


def find_principal(request: Request) -> Principal:
    """Whom `guard` let in."""
    principal: Principal = request.scope[_PRINCIPAL]
    return principal


def find_query(request: Request, model: type[AnyQuery]) -> AnyQuery:
    """The query of this request, of the model that its route names."""
    query = request.scope[_QUERY]
    if not isinstance(query, model):
        raise TypeError(f"the route table names another query than {model.__name__}")
    return query


def find_caller(request: Request) -> str:
    """The agent that `guard` let in."""
    return find_principal(request).agent_id


def path_id(request: Request, name: str, prefix: str) -> str:
    """An id from the path; one that is malformed names nothing."""
    text: str = request.path_params[name]
    try:
        ids.parse_id(prefix, text)
    except Malformed:
        raise not_found() from None
    return text


def find_key(request: Request, value: dict[str, Any], *, secret: bool = False) -> Key | None:
    """The idempotency key of this request, scoped to its caller and its route."""
    text = request.headers.get("idempotency-key")
    if text is None:
        return None
    if not (0 < len(text) <= KEY_CHARACTERS_MAX and text.isascii() and text.isprintable()):
        raise Refused(
            400, "malformed", f"Idempotency-Key has 1 to {KEY_CHARACTERS_MAX} printable characters"
        )
    route = f"{request.method} {dialects.plain_path(request)}"
    return Key(find_caller(request), route, text, hash_body(value), secret)


async def change(
    request: Request,
    model: type[web.Model],
    operation: Callable[[Transaction, str, web.Model], Awaitable[dict[str, Any]]],
    *,
    status: int = 200,
    value: dict[str, Any] | None = None,
    secret: bool = False,
) -> Response:
    """Runs one operation of the caller on a parsed body, once per idempotency key.

    `value` is the body if it was read before; a `secret` answer is stored sealed.
    """
    caller = find_caller(request)
    if value is None:
        value = await web.read_body(request)
    body = web.parse(model, value)
    key = find_key(request, value, secret=secret)
    answer = await perform(request, lambda tx: operation(tx, caller, body), key=key, status=status)
    return respond(request, answer)


async def perform(
    request: Request, operation: Operation, *, key: Key | None = None, status: int = 200
) -> Answer:
    """Runs an operation of the caller, if its API key still works when its turn comes."""
    principal = find_principal(request)
    return await find_ledger(request).perform(
        operation, caller=principal.agent_id, key_id=principal.key_id, key=key, status=status
    )


def respond(request: Request, answer: Answer) -> Response:
    """Writes a ledger's answer in the dialect of the request."""
    return web.respond(dialects.speak(request, answer))


def on_escrow(
    name: str,
    scopes: str,
    model: type[web.Model],
    operation: Callable[[Transaction, str, str, web.Model], Awaitable[dict[str, Any]]],
    summary: str,
    refusals: str,
    *,
    answer: Any = answers.ManualEscrow,
) -> Route:
    """The route of one operation on the escrow of its path."""

    async def endpoint(request: Request) -> Response:
        escrow_id = path_id(request, "escrow_id", ids.ESCROW)
        return await change(
            request, model, lambda tx, caller, body: operation(tx, caller, escrow_id, body)
        )

    endpoint.__name__, endpoint.__doc__ = re.sub("[-/]", "_", name), operation.__doc__
    return Route(
        "POST",
        f"/escrow/{{escrow_id}}/{name}",
        scopes,
        endpoint,
        summary,
        answer,
        model,
        refusals=f"{ON_ESCROW} {refusals}",
    )

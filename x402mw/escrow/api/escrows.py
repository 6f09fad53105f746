"""Routes about one escrow: create, read, and all that its two parties may do with it."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from x402mw.core import ids
from x402mw.core.amounts import ZERO
from x402mw.escrow import bodies, redemption, sessions, web
from x402mw.escrow.access import PROVIDE, READ, SPEND
from x402mw.escrow.api.redemption import judge
from x402mw.escrow.api.shared import (
    PAGE_ITEMS,
    PAGE_ITEMS_MAX,
    Routes,
    change,
    find_caller,
    find_ledger,
    path_id,
)
from x402mw.escrow.errors import Refused
from x402mw.escrow.ledger import Ledger, Operation
from x402mw.escrow.rules.values import STATUSES
from x402mw.escrow.transactions import Transaction


async def create_escrow(request: Request) -> Response:
    """POST /escrow."""
    return await change(request, bodies.NewEscrow, sessions.create, status=201)


async def list_escrows(request: Request) -> Response:
    """GET /escrow."""
    caller, ledger = await find_caller(request), find_ledger(request)
    role = web.query_choice(request, "role", ("buyer", "provider"))
    status = web.query_choice(request, "status", STATUSES)
    limit = web.query_number(request, "limit", PAGE_ITEMS, PAGE_ITEMS_MAX)
    after = web.query_number(request, "after", 0) or None
    await ledger.refresh(caller)
    async with ledger.read() as connection:
        page = await sessions.show_all(
            connection, caller, role=role, status=status, limit=max(limit, 1), after=after
        )
    return JSONResponse(page)


async def show_escrow(request: Request) -> Response:
    """GET /escrow/{id}."""
    caller, ledger = await find_caller(request), find_ledger(request)
    escrow_id = path_id(request, "escrow_id", ids.ESCROW)
    await ledger.refresh(caller)
    async with ledger.read() as connection:
        escrow = await sessions.as_party(connection, caller, escrow_id)
    return JSONResponse(sessions.describe(escrow))


async def renew_token(request: Request) -> Response:
    """POST /escrow/{id}/token. It moves no money, so an idempotency key is not looked at."""
    caller = await find_caller(request)
    escrow_id = path_id(request, "escrow_id", ids.ESCROW)
    web.parse(bodies.Body, await web.read_body(request))
    answer = await find_ledger(request).perform(
        lambda tx: sessions.renew_token(tx, caller, escrow_id), caller=caller
    )
    return web.respond(answer)


async def top_up(request: Request) -> Response:
    """POST /escrow/{id}/topup."""
    escrow_id = path_id(request, "escrow_id", ids.ESCROW)

    async def grow(tx: Transaction, caller: str, body: bodies.TopUp) -> dict[str, Any]:
        return await sessions.top_up(tx, caller, escrow_id, body.amount)

    return await change(request, bodies.TopUp, grow)


async def release(request: Request) -> Response:
    """POST /escrow/{id}/release."""
    escrow_id = path_id(request, "escrow_id", ids.ESCROW)

    async def pay_out(tx: Transaction, caller: str, body: bodies.Release) -> dict[str, Any]:
        return await sessions.release(tx, caller, escrow_id, body.cumulative)

    return await change(request, bodies.Release, pay_out)


async def close(request: Request) -> Response:
    """POST /escrow/{id}/close, by either party; the operation tells them apart."""
    caller, ledger = await find_caller(request), find_ledger(request)
    escrow_id = path_id(request, "escrow_id", ids.ESCROW)
    value = await web.read_body(request)
    body = web.parse(bodies.Close, value)
    if body.voucher is not None and body.amount is None:
        raise Refused(422, "invalid_request", "a voucher comes with the amount to redeem")
    operation = await _closing(ledger, caller, escrow_id, body)
    key = web.idempotency_key(request, caller, value)
    return web.respond(await ledger.perform(operation, caller=caller, key=key))


async def _closing(ledger: Ledger, caller: str, escrow_id: str, body: bodies.Close) -> Operation:
    # Its fields were validated as parts of another body, and the amount is atomic by now.
    item = bodies.RedemptionItem.model_construct(
        voucher=body.voucher, escrow_id=escrow_id, amount=body.amount or ZERO, final=True
    )
    judged = await judge(ledger, caller, [item])

    async def close_for(tx: Transaction) -> dict[str, Any]:
        escrow = await sessions.as_party(tx.connection, caller, escrow_id)
        if caller == escrow.provider:
            proven = redemption.proven_by(judged[0], escrow_id)
            return sessions.close_as_provider(tx, escrow, proven)
        if body.voucher is not None or body.amount is not None:
            raise Refused(422, "invalid_request", "only the provider brings a voucher or amount")
        return sessions.close_as_buyer(tx, escrow)

    return close_for


ROUTES: Routes = (
    ("POST", "/escrow", SPEND, create_escrow),
    ("GET", "/escrow", READ, list_escrows),
    ("GET", "/escrow/{escrow_id}", READ, show_escrow),
    ("POST", "/escrow/{escrow_id}/token", SPEND, renew_token),
    ("POST", "/escrow/{escrow_id}/topup", SPEND, top_up),
    ("POST", "/escrow/{escrow_id}/release", SPEND, release),
    ("POST", "/escrow/{escrow_id}/close", f"{SPEND} {PROVIDE}", close),
)

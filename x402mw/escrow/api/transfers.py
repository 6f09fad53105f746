"""Routes about transfers: one agent pays another without an escrow."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from x402mw.escrow import transfers, web
from x402mw.escrow.access import READ, SPEND
from x402mw.escrow.account_bodies import NewTransfer
from x402mw.escrow.api.shared import (
    PAGE_ITEMS,
    PAGE_ITEMS_MAX,
    Routes,
    change,
    find_caller,
    find_ledger,
    path_id,
)


async def create_transfer(request: Request) -> Response:
    """POST /transfers."""
    return await change(request, NewTransfer, transfers.send, status=201)


async def list_transfers(request: Request) -> Response:
    """GET /transfers."""
    caller = await find_caller(request)
    role = web.query_choice(request, "role", ("sender", "recipient"))
    limit = web.query_number(request, "limit", PAGE_ITEMS, PAGE_ITEMS_MAX)
    after = web.query_number(request, "after", 0) or None
    async with find_ledger(request).read() as connection:
        page = await transfers.show_all(
            connection, caller, role=role, limit=max(limit, 1), after=after
        )
    return JSONResponse(page)


async def show_transfer(request: Request) -> Response:
    """GET /transfers/{id}."""
    caller = await find_caller(request)
    transfer_id = path_id(request, "transfer_id", transfers.TRANSFER)
    async with find_ledger(request).read() as connection:
        return JSONResponse(await transfers.show(connection, caller, transfer_id))


ROUTES: Routes = (
    ("POST", "/transfers", SPEND, create_transfer),
    ("GET", "/transfers", READ, list_transfers),
    ("GET", "/transfers/{transfer_id}", READ, show_transfer),
)

"""Routes about transfers: one agent pays another without an escrow."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from x402mw.escrow import transfers
from x402mw.escrow.access import READ, SPEND
from x402mw.escrow.account_bodies import NewTransfer
from x402mw.escrow.api import account_answers as answers
from x402mw.escrow.api.queries import TransferPage
from x402mw.escrow.api.routes import Route, Routes
from x402mw.escrow.api.shared import change, find_caller, find_ledger, find_query, path_id


async def create_transfer(request: Request) -> Response:
    """POST /transfers."""
    return await change(request, NewTransfer, transfers.send, status=201)


async def list_transfers(request: Request) -> Response:
    """GET /transfers."""
    caller = find_caller(request)
    query = find_query(request, TransferPage)
    page = await find_ledger(request).read(
        lambda db: transfers.show_all(
            db, caller, role=query.role, limit=query.limit, after=query.after
        )
    )
    return JSONResponse(page)


async def show_transfer(request: Request) -> Response:
    """GET /transfers/{id}."""
    caller = find_caller(request)
    transfer_id = path_id(request, "transfer_id", transfers.TRANSFER)
    ledger = find_ledger(request)
    return JSONResponse(await ledger.read(lambda db: transfers.show(db, caller, transfer_id)))


ROUTES: Routes = (
    Route(
        *("POST", "/transfers", SPEND, create_transfer),
        "Pays another agent at once, without an escrow; it cannot be taken back.",
        answers.Transfer,
        NewTransfer,
        status=201,
        refusals="self_payment unknown_agent agent_revoked insufficient_funds",
    ),
    Route(
        *("GET", "/transfers", READ, list_transfers),
        "Lists your transfers, newest first.",
        answers.Transfers,
        query=TransferPage,
    ),
    Route(
        *("GET", "/transfers/{transfer_id}", READ, show_transfer),
        "Shows a transfer to its two parties.",
        answers.Transfer,
    ),
)

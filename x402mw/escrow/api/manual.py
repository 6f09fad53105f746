"""Routes about manual escrows: milestones, refunds, disputes, conditions."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from x402mw.core import ids
from x402mw.core.errors import Malformed
from x402mw.escrow import disputes, manual, web
from x402mw.escrow import manual_bodies as bodies
from x402mw.escrow.access import ARBITER, PROVIDE, SPEND
from x402mw.escrow.api.shared import (
    PAGE_ITEMS,
    PAGE_ITEMS_MAX,
    Routes,
    find_caller,
    find_ledger,
    on_escrow,
)
from x402mw.escrow.bodies import Body
from x402mw.escrow.errors import Refused
from x402mw.escrow.transactions import Transaction


async def _return(
    tx: Transaction, caller: str, escrow_id: str, body: bodies.Return
) -> dict[str, Any]:
    return await manual.give_money_back(tx, caller, escrow_id, body.amount)


async def _withdraw(tx: Transaction, caller: str, escrow_id: str, _body: Body) -> dict[str, Any]:
    return await disputes.withdraw(tx, caller, escrow_id)


async def list_disputes(request: Request) -> Response:
    """GET /disputes, for arbiters."""
    await find_caller(request)
    limit = max(1, web.query_number(request, "limit", PAGE_ITEMS, PAGE_ITEMS_MAX))
    async with find_ledger(request).read() as connection:
        page = await disputes.show_all(connection, limit=limit, after=_cursor(request))
    return JSONResponse(page)


def _cursor(request: Request) -> tuple[int, str] | None:
    text = request.query_params.get("after")
    if text is None:
        return None
    opened_at, _, escrow_id = text.partition(".")
    try:
        ids.parse_id(ids.ESCROW, escrow_id)
        return int(opened_at[:15]), escrow_id
    except (Malformed, ValueError):
        raise Refused(422, "invalid_request", "after is the next of the page before") from None


ROUTES: Routes = (
    ("POST", "/escrow/{escrow_id}/settle", SPEND, on_escrow(bodies.Settlement, manual.settle)),
    (
        "POST",
        "/escrow/{escrow_id}/refund",
        f"{SPEND} {PROVIDE}",
        on_escrow(bodies.TakeBack, manual.refund),
    ),
    ("POST", "/escrow/{escrow_id}/return", PROVIDE, on_escrow(bodies.Return, _return)),
    ("POST", "/escrow/{escrow_id}/deliver", PROVIDE, on_escrow(bodies.Delivery, manual.deliver)),
    ("POST", "/escrow/{escrow_id}/approve", SPEND, on_escrow(bodies.Verdict, manual.approve)),
    ("POST", "/escrow/{escrow_id}/reject", SPEND, on_escrow(bodies.Verdict, manual.reject)),
    (
        "POST",
        "/escrow/{escrow_id}/condition",
        f"{SPEND} {PROVIDE}",
        on_escrow(bodies.Outcome, manual.meet_condition),
    ),
    (
        "POST",
        "/escrow/{escrow_id}/dispute",
        f"{SPEND} {PROVIDE}",
        on_escrow(bodies.NewDispute, disputes.dispute),
    ),
    (
        "POST",
        "/escrow/{escrow_id}/dispute/evidence",
        f"{SPEND} {PROVIDE}",
        on_escrow(bodies.Evidence, disputes.add_evidence),
    ),
    (
        "POST",
        "/escrow/{escrow_id}/dispute/withdraw",
        f"{SPEND} {PROVIDE}",
        on_escrow(Body, _withdraw),
    ),
    (
        "POST",
        "/escrow/{escrow_id}/dispute/resolve",
        ARBITER,
        on_escrow(bodies.Decision, disputes.resolve),
    ),
    ("GET", "/disputes", ARBITER, list_disputes),
)

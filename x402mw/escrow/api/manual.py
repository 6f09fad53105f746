"""Routes about manual escrows: milestones, refunds, disputes, conditions."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from x402mw.core import ids
from x402mw.core.strict import dumps
from x402mw.escrow import disputes, manual, modes
from x402mw.escrow import manual_bodies as bodies
from x402mw.escrow.access import ARBITER, PROVIDE, READ, SPEND
from x402mw.escrow.api import answers
from x402mw.escrow.api.queries import CasePage, DisputePage
from x402mw.escrow.api.routes import Route, Routes
from x402mw.escrow.api.shared import (
    find_ledger,
    find_principal,
    find_query,
    on_escrow,
    path_id,
    respond,
)
from x402mw.escrow.bodies import Body
from x402mw.escrow.deadlines import Of
from x402mw.escrow.idempotency import Answer
from x402mw.escrow.transactions import Transaction


async def _return(
    tx: Transaction, caller: str, escrow_id: str, body: bodies.Return
) -> dict[str, Any]:
    return await manual.give_money_back(tx, caller, escrow_id, body.amount)


async def _withdraw(tx: Transaction, caller: str, escrow_id: str, _body: Body) -> dict[str, Any]:
    return await disputes.withdraw(tx, caller, escrow_id)


async def list_disputes(request: Request) -> Response:
    """GET /disputes, for arbiters."""
    query = find_query(request, DisputePage)
    entry, _, escrow_id = (query.after or "").partition(".")
    after = (int(entry), escrow_id) if escrow_id else None
    ledger = find_ledger(request)
    asset = modes.asset_of(ledger.settings.asset.code, find_principal(request).mode)
    page = await ledger.read(
        lambda db: disputes.show_all(
            db, asset=asset, now=ledger.now(), limit=query.limit, after=after
        )
    )
    return JSONResponse(page)


async def list_escrow_disputes(request: Request) -> Response:
    """GET /escrow/{id}/disputes, for its parties and for arbiters."""
    query, ledger, caller = (
        find_query(request, CasePage),
        find_ledger(request),
        find_principal(request),
    )
    escrow_id = path_id(request, "escrow_id", ids.ESCROW)
    asset = modes.asset_of(ledger.settings.asset.code, caller.mode)
    page = await ledger.read_of(
        escrow_id,
        lambda db: disputes.show_of(
            db, caller, escrow_id, asset=asset, limit=query.limit, after=query.after
        ),
        Of.ONE,
    )
    return respond(request, Answer(200, dumps(page).decode()))


_EITHER = f"{SPEND} {PROVIDE}"
_PART = "unknown_milestone not_covered"

ROUTES: Routes = (
    on_escrow(
        *("settle", SPEND, bodies.Settlement, manual.settle),
        "Pays the provider one share and takes another back, at once.",
        "not_covered amount_out_of_range",
    ),
    on_escrow(
        *("refund", _EITHER, bodies.TakeBack, manual.refund),
        "Sends the buyer what is still held: as the buyer what was never delivered, else all.",
        "not_covered",
    ),
    on_escrow(
        *("return", PROVIDE, bodies.Return, _return),
        "Gives the buyer back what was paid, from the provider's own account.",
        "not_the_provider not_covered insufficient_funds",
        answer=answers.Escrow | answers.ManualEscrow,
    ),
    on_escrow(
        *("deliver", PROVIDE, bodies.Delivery, manual.deliver),
        "Says that a milestone, or all, is done; its review starts.",
        f"not_the_provider expired {_PART}",
    ),
    on_escrow(
        *("approve", SPEND, bodies.Verdict, manual.approve),
        "Pays a milestone, or all.",
        _PART,
    ),
    on_escrow(
        *("reject", SPEND, bodies.Verdict, manual.reject),
        "Does not take a delivery; the provider may deliver again.",
        f"review_over {_PART}",
    ),
    on_escrow(
        *("condition", _EITHER, bodies.Outcome, manual.meet_condition),
        "Presents the outcome that was agreed on, which pays the provider; anybody may.",
        "no_condition condition_not_met expired not_covered",
        answer=answers.ConditionMet,
    ),
    on_escrow(
        *("dispute", _EITHER, bodies.NewDispute, disputes.dispute),
        "Holds an amount back until an arbiter decides.",
        f"withdrawn_too_often {_PART}",
    ),
    on_escrow(
        *("dispute/evidence", _EITHER, bodies.Evidence, disputes.add_evidence),
        "Adds a statement to the open dispute.",
        "too_much_evidence",
    ),
    on_escrow(
        *("dispute/withdraw", _EITHER, Body, _withdraw),
        "Takes a dispute back; only who opened it may.",
        "not_the_opener",
    ),
    on_escrow(
        *("dispute/resolve", ARBITER, bodies.Decision, disputes.resolve),
        "Decides a dispute: how much of it goes to whom.",
        "arbiter_is_party not_covered amount_out_of_range",
    ),
    Route(
        *("GET", "/escrow/{escrow_id}/disputes", f"{READ} {ARBITER}", list_escrow_disputes),
        "Lists the disputes of an escrow, newest first: what was said, and the escrow itself.",
        answers.Cases,
        query=CasePage,
    ),
    Route(
        *("GET", "/disputes", ARBITER, list_disputes),
        "Lists open disputes, oldest first.",
        answers.Disputes,
        query=DisputePage,
    ),
)

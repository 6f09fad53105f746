"""Routes about vouchers in batches: redemption, and what changed in a journal's sessions."""

from starlette.requests import Request
from starlette.responses import Response

from x402mw.core.vouchers import network_id
from x402mw.escrow import bodies, redemption, web
from x402mw.escrow.access import PROVIDE
from x402mw.escrow.api import answers
from x402mw.escrow.api.queries import Changes
from x402mw.escrow.api.routes import Route, Routes
from x402mw.escrow.api.shared import find_caller, find_key, find_ledger, find_query, perform
from x402mw.escrow.ledger import Ledger

REDEEM_BYTES_MAX = 1024 * 1024


async def redeem(request: Request) -> Response:
    """POST /redeem."""
    caller, ledger = find_caller(request), find_ledger(request)
    value = await web.read_body(request, REDEEM_BYTES_MAX)
    batch = web.parse(bodies.Redemption, value)
    key = find_key(request, value)
    judged = await judge(ledger, caller, batch.items)
    answer = await perform(
        request, lambda tx: redemption.redeem(tx, caller, batch, judged), key=key
    )
    return web.respond(answer)


async def judge(
    ledger: Ledger, caller: str, items: list[bodies.RedemptionItem]
) -> list[redemption.Claim | redemption.BadItem]:
    """Verifies the vouchers of some items, before any transaction."""
    network = network_id(ledger.settings.network, ledger.signer.root_key)
    return await redemption.judge(ledger.read, caller, items, network)


async def show_changes(request: Request) -> Response:
    """GET /changes."""
    caller = find_caller(request)
    query = find_query(request, Changes)
    answer = await perform(
        request,
        lambda tx: redemption.show_changes(
            tx,
            caller,
            query.journal,
            serial=query.serial,
            since=query.since,
            limit=query.limit,
        ),
    )
    return web.respond(answer)


ROUTES: Routes = (
    Route(
        *("POST", "/redeem", PROVIDE, redeem),
        "Redeems vouchers in a batch; each is judged alone.",
        answers.Redeemed,
        bodies.Redemption,
        refusals="not_found amount_out_of_range",
    ),
    Route(
        *("GET", "/changes", PROVIDE, show_changes),
        "Shows the sessions of a journal that changed, in the order of their last change.",
        answers.ChangeList,
        query=Changes,
        refusals="not_found",
    ),
)

"""Routes about vouchers in batches: redemption, and what changed in a journal's sessions."""

from starlette.requests import Request
from starlette.responses import Response

from x402mw.core import ids
from x402mw.core.errors import Malformed
from x402mw.core.vouchers import network_id
from x402mw.escrow import bodies, redemption, web
from x402mw.escrow.access import PROVIDE
from x402mw.escrow.api.shared import PAGE_ITEMS, Routes, find_caller, find_ledger
from x402mw.escrow.errors import Refused
from x402mw.escrow.ledger import Ledger

REDEEM_BYTES_MAX = 1024 * 1024


async def redeem(request: Request) -> Response:
    """POST /redeem."""
    caller, ledger = await find_caller(request), find_ledger(request)
    value = await web.read_body(request, REDEEM_BYTES_MAX)
    batch = web.parse(bodies.Redemption, value)
    key = web.idempotency_key(request, caller, value)
    judged = await judge(ledger, caller, batch.items)
    answer = await ledger.perform(
        lambda tx: redemption.redeem(tx, caller, batch, judged), caller=caller, key=key
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
    caller, ledger = await find_caller(request), find_ledger(request)
    try:
        journal = ids.format_id(
            ids.JOURNAL, ids.parse_id(ids.JOURNAL, request.query_params.get("journal"))
        )
    except Malformed as error:
        raise Refused(422, "invalid_request", f"journal: {error}") from None
    since = web.query_number(request, "since", 0)
    serial = web.query_number(request, "serial", 0)
    limit = web.query_number(request, "limit", PAGE_ITEMS, redemption.CHANGES_MAX)
    answer = await ledger.perform(
        lambda tx: redemption.show_changes(
            tx, caller, journal, serial=serial, since=since, limit=max(limit, 1)
        ),
        caller=caller,
    )
    return web.respond(answer)


ROUTES: Routes = (
    ("POST", "/redeem", PROVIDE, redeem),
    ("GET", "/changes", PROVIDE, show_changes),
)

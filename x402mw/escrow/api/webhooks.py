"""Routes about webhooks: each agent's own."""

from typing import Annotated, Any

from pydantic import AfterValidator, Field, WithJsonSchema
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from x402mw.escrow import access
from x402mw.escrow.access import READ
from x402mw.escrow.api import account_answers as answers
from x402mw.escrow.api.queries import DeliveryPage
from x402mw.escrow.api.routes import Route, Routes
from x402mw.escrow.api.shared import (
    MANAGING,
    change,
    find_caller,
    find_ledger,
    find_principal,
    find_query,
    path_id,
)
from x402mw.escrow.bodies import Body, EscrowId, printable
from x402mw.escrow.errors import not_found
from x402mw.escrow.events import webhooks
from x402mw.escrow.events.derive import NAMES
from x402mw.escrow.transactions import Transaction

URL_CHARACTERS_MAX = 2048


def _known(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"an event is one of {', '.join(NAMES)}")
    return name


class NewWebhook(Body):
    """`POST /webhooks`; no events means all of them."""

    url: Annotated[str, Field(max_length=URL_CHARACTERS_MAX), AfterValidator(printable)]
    events: Annotated[
        list[
            Annotated[
                str, AfterValidator(_known), WithJsonSchema({"type": "string", "enum": [*NAMES]})
            ]
        ],
        Field(max_length=len(NAMES), default_factory=list),
    ]
    escrow_id: EscrowId | None = None


async def create_webhook(request: Request) -> Response:
    """POST /webhooks."""
    asker = find_principal(request)

    async def create(tx: Transaction, caller: str, body: NewWebhook) -> dict[str, Any]:
        await access.check_stays(tx, asker)
        events, key_id = tuple(dict.fromkeys(body.events)), asker.key_id
        return await webhooks.create(tx, caller, body.url, events, body.escrow_id, key_id=key_id)

    return await change(request, NewWebhook, create, status=201, secret=True)


async def list_webhooks(request: Request) -> Response:
    """GET /webhooks."""
    caller = find_caller(request)
    ledger = find_ledger(request)
    return JSONResponse(await ledger.read(lambda db: webhooks.show_all(db, caller)))


async def delete_webhook(request: Request) -> Response:
    """DELETE /webhooks/{id}."""
    webhook_id = path_id(request, "webhook_id", webhooks.WEBHOOK_ID)

    async def remove(tx: Transaction, caller: str, _body: Body) -> dict[str, Any]:
        return await webhooks.remove(tx, caller, webhook_id)

    return await change(request, Body, remove)


async def rotate_webhook(request: Request) -> Response:
    """POST /webhooks/{id}/rotate."""
    webhook_id = path_id(request, "webhook_id", webhooks.WEBHOOK_ID)
    asker = find_principal(request)

    async def rotate(tx: Transaction, caller: str, _body: Body) -> dict[str, Any]:
        await access.check_stays(tx, asker)
        return await webhooks.rotate(tx, caller, webhook_id)

    return await change(request, Body, rotate, secret=True)


async def list_deliveries(request: Request) -> Response:
    """GET /webhooks/{id}/deliveries."""
    caller = find_caller(request)
    webhook_id = path_id(request, "webhook_id", webhooks.WEBHOOK_ID)
    query = find_query(request, DeliveryPage)
    after = None if query.after is None else _event_number(query.after)
    page = await find_ledger(request).read(
        lambda db: webhooks.show_deliveries(db, caller, webhook_id, limit=query.limit, after=after)
    )
    return JSONResponse(page)


async def redeliver(request: Request) -> Response:
    """POST /webhooks/{id}/deliveries/{event_id}/redeliver."""
    webhook_id = path_id(request, "webhook_id", webhooks.WEBHOOK_ID)
    seq, part = _event_number(request.path_params["event_id"])

    async def again(tx: Transaction, caller: str, _body: Body) -> dict[str, Any]:
        return await webhooks.redeliver(tx, caller, webhook_id, seq, part)

    return await change(request, Body, again)


def _event_number(text: str) -> tuple[int, int]:
    seq, _, part = text.partition(".")
    if not all(
        each.isdecimal() and each.isascii() and len(each) < 18 for each in (seq, part or "0")
    ):
        raise not_found()
    return int(seq), int(part or "0")


_ONE = "/webhooks/{webhook_id}"
ROUTES: Routes = (
    Route(
        *("POST", "/webhooks", MANAGING, create_webhook),
        "Makes a webhook: from now on events are sent to a URL, signed with its secret.",
        answers.MadeWebhook,
        NewWebhook,
        status=201,
        refusals="not_found too_many_webhooks key_ending",
        also=READ,
    ),
    Route(
        *("GET", "/webhooks", READ, list_webhooks),
        "Lists your webhooks, without their secrets.",
        answers.Webhooks,
    ),
    Route(
        *("DELETE", _ONE, MANAGING, delete_webhook),
        "Deletes a webhook, with all that it was not told yet.",
        answers.Webhook,
    ),
    Route(
        *("POST", _ONE + "/rotate", MANAGING, rotate_webhook),
        "Makes the next secret; for a day deliveries are signed with both.",
        answers.RotatedWebhook,
        Body,
        refusals="key_ending",
        also=READ,
    ),
    Route(
        *("GET", _ONE + "/deliveries", READ, list_deliveries),
        "Lists what a webhook was told, the newest event first, dead ones among them.",
        answers.Deliveries,
        query=DeliveryPage,
    ),
    Route(
        *("POST", _ONE + "/deliveries/{event_id}/redeliver", MANAGING, redeliver),
        "Sends one event again as soon as possible.",
        answers.SentEvent,
        Body,
        refusals="waits_its_turn",
        also=READ,
    ),
)

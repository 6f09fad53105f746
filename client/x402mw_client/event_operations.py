"""What can be asked about what happened: an escrow's history, pauses, and our webhooks.

Values as in `operations`. `webhooks.verify` is for who receives deliveries.
"""

import secrets
from collections.abc import Sequence

from x402mw.core.errors import LocalError
from x402mw_client.operations import (
    API,
    AnyEscrow,
    Listing,
    Operation,
    Progress,
    given,
    move,
    name_of,
    path_of,
    write_id,
)
from x402mw_client.records import (
    Delivery,
    EscrowRecord,
    HistoryLine,
    NewWebhook,
    Page,
    Webhook,
    Webhooks,
)

WEBHOOK = "wh_"

# History and pauses.


def list_history(
    escrow: AnyEscrow, *, limit: int | None = None, after: str | None = None
) -> Operation[Page[HistoryLine]]:
    """Fetches a page of all that happened to an escrow, newest first."""
    query = given(limit=limit, after=after)
    path = API + path_of(escrow, "/history")
    return Operation(Page[HistoryLine], "GET", path, query=query)


def iter_history(
    escrow: AnyEscrow, *, page_items: int | None = None, progress: Progress | None = None
) -> Listing[HistoryLine]:
    """Goes through all that happened to an escrow, newest first."""
    return Listing(lambda after: list_history(escrow, limit=page_items, after=after), progress)


def pause(
    escrow: AnyEscrow, reason: str = "", *, key: str | None = None
) -> Operation[EscrowRecord]:
    """Tells the other party that we pause; moves nothing."""
    return move(EscrowRecord, path_of(escrow, "/pause"), {"reason": reason}, key)


def resume(
    escrow: AnyEscrow, reason: str = "", *, key: str | None = None
) -> Operation[EscrowRecord]:
    """Tells the other party that we go on; moves nothing."""
    return move(EscrowRecord, path_of(escrow, "/resume"), {"reason": reason}, key)


# Webhooks.


def create_webhook(
    url: str, events: Sequence[str] = (), *, escrow: AnyEscrow | None = None, key: str | None = None
) -> Operation[NewWebhook]:
    """Has events told to a URL from now on: some kinds or all, of one escrow or all of ours.

    The answer holds the secret that deliveries are signed with, this once.
    """
    body = given(
        url=url, events=list(events), escrow_id=None if escrow is None else name_of(escrow)
    )
    return move(NewWebhook, "/webhooks", body, key)


def list_webhooks() -> Operation[Webhooks]:
    """Shows all our webhooks, oldest first."""
    return Operation(Webhooks, "GET", f"{API}/webhooks")


def delete_webhook(webhook_id: str) -> Operation[Webhook]:
    """Ends a webhook, with all that it was not told yet."""
    # Under a key, so that a repeat after a lost answer does not find it gone.
    key = secrets.token_urlsafe(24)
    return Operation(Webhook, "DELETE", API + _path(webhook_id), key=key)


def rotate_webhook(webhook_id: str, *, key: str | None = None) -> Operation[NewWebhook]:
    """Makes the next secret of a webhook; for a day deliveries are signed with both."""
    return move(NewWebhook, _path(webhook_id, "/rotate"), {}, key)


def list_deliveries(
    webhook_id: str, *, limit: int | None = None, after: str | None = None
) -> Operation[Page[Delivery]]:
    """Fetches a page of what a webhook was told, newest event first, dead ones among them."""
    query = given(limit=limit, after=after)
    path = API + _path(webhook_id, "/deliveries")
    return Operation(Page[Delivery], "GET", path, query=query)


def iter_deliveries(
    webhook_id: str, *, page_items: int | None = None, progress: Progress | None = None
) -> Listing[Delivery]:
    """Goes through all that a webhook was told, newest event first."""
    return Listing(
        lambda after: list_deliveries(webhook_id, limit=page_items, after=after), progress
    )


def redeliver(webhook_id: str, event_id: str, *, key: str | None = None) -> Operation[Delivery]:
    """Sends an event again, as soon as possible."""
    action = f"/deliveries/{check_event_id(event_id)}/redeliver"
    return move(Delivery, _path(webhook_id, action), {}, key)


def check_event_id(event_id: str) -> str:
    """Returns the id of an event, or raises `LocalError`."""
    if not event_id.isascii() or not event_id.replace(".", "", 1).isdecimal():
        raise LocalError("an event's id is a number, or two with a point between")
    return event_id


def _path(webhook_id: str, action: str = "") -> str:
    return f"/webhooks/{write_id(WEBHOOK, webhook_id)}{action}"

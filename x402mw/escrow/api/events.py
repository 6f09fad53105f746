"""Routes about what happened: an escrow's history, its pauses, and the live stream of events."""

import json
import re
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from pydantic import AfterValidator, Field
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from x402mw.core import ids
from x402mw.escrow import sessions
from x402mw.escrow.access import PROVIDE, READ, SPEND
from x402mw.escrow.api import answers
from x402mw.escrow.api.queries import Page, Query
from x402mw.escrow.api.routes import Route, Routes
from x402mw.escrow.api.shared import (
    authenticate,
    find_caller,
    find_ledger,
    find_query,
    on_escrow,
    path_id,
)
from x402mw.escrow.bodies import Body, EscrowId, printable
from x402mw.escrow.books import Entry
from x402mw.escrow.errors import Refused
from x402mw.escrow.events import feed as feeds
from x402mw.escrow.events.derive import PAUSE, RESUME, Told
from x402mw.escrow.events.feed import Feed, Position, Reader
from x402mw.escrow.events.log import describe, read_history
from x402mw.escrow.rules.values import Escrow, Phase
from x402mw.escrow.transactions import Transaction

REASON_CHARACTERS_MAX = 200
RETRY_MILLISECONDS = 2000
PARTS_MAX = 999
EVENT_STREAM = "text/event-stream"
_EVENT_ID = re.compile(r"([0-9]{1,18})(?:\.([0-9]{1,3}))?", re.ASCII)


class Reason(Body):
    """`POST /escrow/{id}/pause` and `/resume`."""

    reason: Annotated[str, Field(max_length=REASON_CHARACTERS_MAX), AfterValidator(printable)] = ""


class OfEscrow(Query):
    """`GET /events`: of all escrows, or of one."""

    escrow_id: EscrowId | None = None


def _telling(kind: str) -> Route:
    async def operation(
        tx: Transaction, caller: str, escrow_id: str, body: Reason
    ) -> dict[str, Any]:
        escrow = await sessions.as_party(tx.connection, caller, escrow_id)
        if escrow.phase is Phase.ENDED:
            detail = f"{kind} is not possible while the escrow is {escrow.status}"
            raise Refused(409, "invalid_state", detail, state=escrow.status)
        data = {"reason": body.reason} if body.reason else None
        return sessions.describe(tx.save(escrow, escrow, kind, data=data))

    operation.__name__ = kind
    operation.__doc__ = f"POST /escrow/{{id}}/{kind}: tells the other party, and moves nothing."
    return on_escrow(
        *(kind, f"{SPEND} {PROVIDE}", Reason, operation),
        f"Tells the other party to {kind}; moves nothing.",
        "",
        answer=answers.Escrow,
    )


async def show_history(request: Request) -> Response:
    """GET /escrow/{id}/history: every entry about it, newest first."""
    caller, ledger = find_caller(request), find_ledger(request)
    escrow_id = path_id(request, "escrow_id", ids.ESCROW)
    query = find_query(request, Page)

    async def look(connection: AsyncConnection) -> tuple[Escrow, list[Entry]]:
        escrow = await sessions.as_party(connection, caller, escrow_id)
        start = query.after or escrow.last_entry
        return escrow, await read_history(connection, escrow_id, start, query.limit)

    escrow, found = await ledger.read_of(caller, look)
    items = [
        describe(entry, escrow.buyer, json.loads(entry.data) if entry.data else {})
        for entry in found
    ]
    earlier = found[-1].before if found else None
    return JSONResponse({"items": items, "next": None if earlier is None else str(earlier)})


async def stream_events(request: Request) -> Response:
    """GET /events: Server-Sent Events of the caller's escrows, from now or Last-Event-ID on."""
    caller = find_caller(request)
    feed: Feed = request.app.state.feed
    escrow_id = find_query(request, OfEscrow).escrow_id
    if escrow_id is not None:
        wanted = escrow_id
        await find_ledger(request).read(lambda db: sessions.as_party(db, caller, wanted))
    since = _position(request, await feed.head())
    headers = {"X-Accel-Buffering": "no"}
    if request.method == "HEAD":
        return Response(headers=headers, media_type=EVENT_STREAM)
    # Taken before the answer begins: from there on it could not be refused.
    reader = feed.enter(caller, escrow_id)
    return _Stream(_write_all(request, feed, reader, since), headers, feed, reader)


class _Stream(StreamingResponse):
    """Gives its place back however it ends, also if it never began."""

    def __init__(
        self, lines: AsyncIterator[str], headers: dict[str, str], feed: Feed, reader: Reader
    ) -> None:
        super().__init__(lines, headers=headers, media_type=EVENT_STREAM)
        self._feed, self._reader = feed, reader

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._feed.leave(self._reader)


async def _write_all(
    request: Request, feed: Feed, reader: Reader, since: Position
) -> AsyncIterator[str]:
    # The place as an id: who loses the stream before its first event misses none.
    yield f"retry: {RETRY_MILLISECONDS}\nid: {_write_position(since)}\n\n"
    asked = time.monotonic()
    async for told in feed.follow(reader, since):
        # A key may die while the stream is open, and without a word when its time is over.
        if reader.doubted or time.monotonic() - asked >= feeds.KEEP_ALIVE_SECONDS:
            reader.doubted, asked = False, time.monotonic()
            if not await _still_works(request):
                return
        yield ":\n\n" if told is None else _write(told)


async def _still_works(request: Request) -> bool:
    try:
        await authenticate(request)
    except Refused:
        return False
    return True


def _write(told: Told) -> str:
    return f"id: {told.id}\nevent: {told.name}\ndata: {told.body}\n\n"


def _write_position(position: Position) -> str:
    seq, part = position
    return f"{seq}.{part}" if part >= 0 else f"{seq - 1}.{PARTS_MAX}"


def _position(request: Request, head: int) -> Position:
    """After which event the stream goes on; without one, after the newest."""
    text = request.headers.get("last-event-id", "")
    if not text:
        return head + 1, -1
    found = _EVENT_ID.fullmatch(text)
    if found is None or int(found[1]) > head:
        raise Refused(422, "invalid_request", "Last-Event-ID is the id of an event")
    return int(found[1]), int(found[2] or 0)


ROUTES: Routes = (
    Route(
        *("GET", "/escrow/{escrow_id}/history", READ, show_history),
        "Shows every entry of the books about an escrow, newest first.",
        answers.History,
        query=Page,
    ),
    _telling(PAUSE),
    _telling(RESUME),
    Route(
        *("GET", "/events", READ, stream_events),
        "Streams the events of your escrows, from now on or from Last-Event-ID on.",
        None,
        query=OfEscrow,
        refusals="not_found too_many_streams",
        media=EVENT_STREAM,
    ),
)

"""The escrow as an ASGI application: its routes, and what runs beside them."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from typing import NamedTuple

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import BaseRoute

from x402mw.core.telemetry import Telemetry
from x402mw.escrow import web
from x402mw.escrow.api import (
    admin,
    agents,
    escrows,
    events,
    keys,
    manual,
    openapi,
    page,
    redemption,
    service,
    transfers,
    webhooks,
)
from x402mw.escrow.api.dialects import BASES
from x402mw.escrow.api.routes import Routes, mount
from x402mw.escrow.api.shared import guard
from x402mw.escrow.deadlines import HEARTBEAT_SECONDS
from x402mw.escrow.events.deliverer import Deliverer
from x402mw.escrow.events.feed import Feed
from x402mw.escrow.events.posting import Poster
from x402mw.escrow.ledger import Clock, Ledger, open_ledger
from x402mw.escrow.observing import Observed
from x402mw.escrow.settings import Settings

ROUTES: Routes = (
    *(*agents.ROUTES, *keys.ROUTES, *transfers.ROUTES, *escrows.ROUTES),
    *(*manual.ROUTES, *redemption.ROUTES, *admin.ROUTES),
    *(*events.ROUTES, *webhooks.ROUTES),
)
"""All below each base path."""

_log = logging.getLogger("x402mw.escrow")


def create_app(
    settings: Settings, *, clock: Clock = time.time, telemetry: Telemetry | None = None
) -> Starlette:
    """Makes the ASGI application; its lifespan opens the books and keeps the heartbeat.

    `telemetry` takes figures (`docs/operations.md`).
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        ledger = await open_ledger(settings, clock, serving=True)
        app.state.ledger = ledger
        app.state.feed = Feed(ledger)
        deliverer = Deliverer(ledger, Poster(local=settings.local_webhooks))
        tasks = [
            asyncio.create_task(work)
            for work in (_sweep_forever(ledger), deliverer.run(), app.state.feed.run())
        ]
        try:
            yield
        finally:
            app.state.feed.close()
            for task in tasks:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await ledger.close()

    app = Starlette(
        routes=_routes(),
        lifespan=lifespan,
        exception_handlers=web.EXCEPTION_HANDLERS,
        middleware=[
            Middleware(web.Stamped, clock=clock),
            Middleware(Observed, telemetry=telemetry),
        ],
    )
    # A redirect would be built from the Host header; a path with a slash too many is just unknown.
    app.router.redirect_slashes = False
    app.state.documents = _documents()
    return app


class Documents(NamedTuple):
    """The API's description, for machines and for people."""

    json: str
    page: str


@cache
def _documents() -> Documents:
    document = openapi.build(service.ROUTES, ROUTES)
    return Documents(json.dumps(document, ensure_ascii=False), page.write(document))


def say_farewell(app: Starlette) -> None:
    """Ends the streams of events, which would go on for ever."""
    if hasattr(app.state, "feed"):
        app.state.feed.close()


async def _sweep_forever(ledger: Ledger) -> None:
    while True:
        try:
            await ledger.sweep()
        except Exception:
            # Deadlines also apply on access, so a failed sweep delays nothing but tidiness.
            _log.exception("a sweep of deadlines failed", extra={"event": "sweep_failed"})
        await asyncio.sleep(HEARTBEAT_SECONDS)


def _routes() -> list[BaseRoute]:
    bases = [("", service.ROUTES), *((base, ROUTES) for base in BASES)]
    return [entry for base, routes in bases for entry in mount(base, routes, guard)]

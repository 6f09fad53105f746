"""The escrow's HTTP API: one small function for each route of `docs/escrow.md`.

Each function reads its request, hands one operation to the ledger and writes the answer. Who may
do what is decided by the operations.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from x402mw.core import ids
from x402mw.core.amounts import ZERO
from x402mw.core.errors import Malformed
from x402mw.core.strict import b64url_encode
from x402mw.core.telemetry import Telemetry
from x402mw.core.vouchers import network_id
from x402mw.escrow import agents, bodies, redemption, sessions, web
from x402mw.escrow.deadlines import HEARTBEAT_SECONDS
from x402mw.escrow.errors import Refused, not_found
from x402mw.escrow.ledger import Clock, Ledger, Operation, open_ledger
from x402mw.escrow.observing import Observed
from x402mw.escrow.rules import STATUSES
from x402mw.escrow.settings import Settings
from x402mw.escrow.transactions import Transaction

API = "/api/v1"
REDEEM_BYTES_MAX = 1024 * 1024
PAGE_ITEMS = 100
PAGE_ITEMS_MAX = 500
_BEARER = "bearer "
Endpoint = Callable[[Request], Awaitable[Response]]
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
        sweeper = asyncio.create_task(_sweep_forever(ledger))
        try:
            yield
        finally:
            sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sweeper
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
    return app


async def _sweep_forever(ledger: Ledger) -> None:
    while True:
        try:
            await ledger.sweep()
        except Exception:
            # Deadlines also apply on access, so a failed sweep delays nothing but tidiness.
            _log.exception("a sweep of deadlines failed", extra={"event": "sweep_failed"})
        await asyncio.sleep(HEARTBEAT_SECONDS)


def _routes() -> list[BaseRoute]:
    api: list[tuple[str, str, Endpoint]] = [
        ("POST", "/agents", register_agent),
        ("GET", "/agents/me", show_agent),
        ("POST", "/faucet/claim", claim_faucet),
        ("PUT", "/journals/{journal}", register_journal),
        ("POST", "/escrow", create_escrow),
        ("GET", "/escrow", list_escrows),
        ("GET", "/escrow/{escrow_id}", show_escrow),
        ("POST", "/escrow/{escrow_id}/token", renew_token),
        ("POST", "/escrow/{escrow_id}/topup", top_up),
        ("POST", "/escrow/{escrow_id}/release", release),
        ("POST", "/escrow/{escrow_id}/close", close),
        ("POST", "/redeem", redeem),
        ("GET", "/changes", show_changes),
    ]
    return [
        Route("/health", show_health, methods=["GET"]),
        Route("/.well-known/x402mw-keys", show_keys, methods=["GET"]),
        *(Route(API + path, endpoint, methods=[method]) for method, path, endpoint in api),
    ]


# What the routes share.


def _ledger(request: Request) -> Ledger:
    ledger: Ledger = request.app.state.ledger
    return ledger


async def _caller(request: Request) -> str:
    """The agent whose API key this request carries."""
    header = request.headers.get("authorization", "")
    api_key = header[len(_BEARER) :].strip() if header[: len(_BEARER)].lower() == _BEARER else ""
    async with _ledger(request).read() as connection:
        agent_id = await agents.find_by_key(connection, api_key)
    if agent_id is None:
        raise Refused(
            401,
            "unauthorized",
            "send Authorization: Bearer and your API key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return agent_id


def _path_id(request: Request, name: str, prefix: str) -> str:
    """An id from the path; one that is malformed names nothing."""
    text: str = request.path_params[name]
    try:
        ids.parse_id(prefix, text)
    except Malformed:
        raise not_found() from None
    return text


async def _change(
    request: Request,
    model: type[web.Model],
    operation: Callable[[Transaction, str, web.Model], Awaitable[dict[str, Any]]],
    *,
    status: int = 200,
) -> Response:
    """Runs one operation of the caller on a parsed body, once per idempotency key."""
    caller = await _caller(request)
    value = await web.read_body(request)
    body = web.parse(model, value)
    key = web.idempotency_key(request, caller, value)
    ledger = _ledger(request)
    answer = await ledger.perform(
        lambda tx: operation(tx, caller, body), caller=caller, key=key, status=status
    )
    return web.respond(answer)


# Service.


async def show_health(request: Request) -> Response:
    """GET /health."""
    ledger = _ledger(request)
    return JSONResponse({"status": "ok", "network": ledger.settings.network, "time": ledger.now()})


async def show_keys(request: Request) -> Response:
    """GET /.well-known/x402mw-keys."""
    ledger = _ledger(request)
    return JSONResponse(
        {
            "network": ledger.settings.network,
            "root_key": b64url_encode(ledger.signer.root_key),
            "key_set": await ledger.key_set(),
        }
    )


# Agents.


async def register_agent(request: Request) -> Response:
    """POST /agents."""
    body = web.parse(bodies.NewAgent, await web.read_body(request))
    answer = await _ledger(request).perform(
        lambda tx: agents.register(tx, body.name), caller=None, status=201
    )
    return web.respond(answer)


async def show_agent(request: Request) -> Response:
    """GET /agents/me."""
    caller, ledger = await _caller(request), _ledger(request)
    await ledger.refresh(caller)
    async with ledger.read() as connection:
        return JSONResponse(await agents.describe(connection, caller))


async def claim_faucet(request: Request) -> Response:
    """POST /faucet/claim."""
    source = agents.claim_source(request.client.host if request.client else None)

    async def claim(tx: Transaction, caller: str, _body: bodies.Body) -> dict[str, Any]:
        return await agents.claim_faucet(tx, caller, source)

    return await _change(request, bodies.Body, claim)


async def register_journal(request: Request) -> Response:
    """PUT /journals/{id}."""
    journal = _path_id(request, "journal", ids.JOURNAL)

    async def register(tx: Transaction, caller: str, body: bodies.NewJournal) -> dict[str, Any]:
        return await agents.register_journal(tx, caller, journal, body.receipt_key)

    return await _change(request, bodies.NewJournal, register)


# Escrows.


async def create_escrow(request: Request) -> Response:
    """POST /escrow."""
    return await _change(request, bodies.NewEscrow, sessions.create, status=201)


async def list_escrows(request: Request) -> Response:
    """GET /escrow."""
    caller, ledger = await _caller(request), _ledger(request)
    role = web.query_choice(request, "role", ("buyer", "provider"))
    status = web.query_choice(request, "status", STATUSES)
    limit = web.query_number(request, "limit", PAGE_ITEMS, PAGE_ITEMS_MAX)
    after = web.query_number(request, "after", 0) or None
    await ledger.refresh(caller)
    async with ledger.read() as connection:
        page = await sessions.show_all(
            connection, caller, role=role, status=status, limit=max(limit, 1), after=after
        )
    return JSONResponse(page)


async def show_escrow(request: Request) -> Response:
    """GET /escrow/{id}."""
    caller, ledger = await _caller(request), _ledger(request)
    escrow_id = _path_id(request, "escrow_id", ids.ESCROW)
    await ledger.refresh(caller)
    async with ledger.read() as connection:
        escrow = await sessions.as_party(connection, caller, escrow_id)
    return JSONResponse(sessions.describe(escrow))


async def renew_token(request: Request) -> Response:
    """POST /escrow/{id}/token. It moves no money, so an idempotency key is not looked at."""
    caller = await _caller(request)
    escrow_id = _path_id(request, "escrow_id", ids.ESCROW)
    web.parse(bodies.Body, await web.read_body(request))
    answer = await _ledger(request).perform(
        lambda tx: sessions.renew_token(tx, caller, escrow_id), caller=caller
    )
    return web.respond(answer)


async def top_up(request: Request) -> Response:
    """POST /escrow/{id}/topup."""
    escrow_id = _path_id(request, "escrow_id", ids.ESCROW)

    async def grow(tx: Transaction, caller: str, body: bodies.TopUp) -> dict[str, Any]:
        return await sessions.top_up(tx, caller, escrow_id, body.amount)

    return await _change(request, bodies.TopUp, grow)


async def release(request: Request) -> Response:
    """POST /escrow/{id}/release."""
    escrow_id = _path_id(request, "escrow_id", ids.ESCROW)

    async def pay_out(tx: Transaction, caller: str, body: bodies.Release) -> dict[str, Any]:
        return await sessions.release(tx, caller, escrow_id, body.cumulative)

    return await _change(request, bodies.Release, pay_out)


async def close(request: Request) -> Response:
    """POST /escrow/{id}/close, by either party; the operation tells them apart."""
    caller, ledger = await _caller(request), _ledger(request)
    escrow_id = _path_id(request, "escrow_id", ids.ESCROW)
    value = await web.read_body(request)
    body = web.parse(bodies.Close, value)
    if body.voucher is not None and body.amount is None:
        raise Refused(422, "invalid_request", "a voucher comes with the amount to redeem")
    operation = await _closing(ledger, caller, escrow_id, body)
    key = web.idempotency_key(request, caller, value)
    return web.respond(await ledger.perform(operation, caller=caller, key=key))


async def _closing(ledger: Ledger, caller: str, escrow_id: str, body: bodies.Close) -> Operation:
    # Its fields were validated as parts of another body, and the amount is atomic by now.
    item = bodies.RedemptionItem.model_construct(
        voucher=body.voucher, escrow_id=escrow_id, amount=body.amount or ZERO, final=True
    )
    judged = await _judge(ledger, caller, [item])

    async def close_for(tx: Transaction) -> dict[str, Any]:
        escrow = await sessions.as_party(tx.connection, caller, escrow_id)
        if caller == escrow.provider:
            proven = redemption.proven_by(judged[0], escrow_id)
            return sessions.close_as_provider(tx, escrow, proven)
        if body.voucher is not None or body.amount is not None:
            raise Refused(422, "invalid_request", "only the provider brings a voucher or amount")
        return sessions.close_as_buyer(tx, escrow)

    return close_for


# Redemption.


async def redeem(request: Request) -> Response:
    """POST /redeem."""
    caller, ledger = await _caller(request), _ledger(request)
    value = await web.read_body(request, REDEEM_BYTES_MAX)
    batch = web.parse(bodies.Redemption, value)
    key = web.idempotency_key(request, caller, value)
    judged = await _judge(ledger, caller, batch.items)
    answer = await ledger.perform(
        lambda tx: redemption.redeem(tx, caller, batch, judged), caller=caller, key=key
    )
    return web.respond(answer)


async def _judge(
    ledger: Ledger, caller: str, items: list[bodies.RedemptionItem]
) -> list[redemption.Claim | redemption.BadItem]:
    network = network_id(ledger.settings.network, ledger.signer.root_key)
    return await redemption.judge(ledger.read, caller, items, network)


async def show_changes(request: Request) -> Response:
    """GET /changes."""
    caller, ledger = await _caller(request), _ledger(request)
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

"""Routes about one escrow: create, read, and all that its two parties may do with it."""

from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.requests import Request
from starlette.responses import Response

from x402mw.core import ids
from x402mw.core.amounts import ZERO, atomic
from x402mw.core.strict import dumps
from x402mw.escrow import bodies, manual, manual_bodies, redemption, sessions, web
from x402mw.escrow.access import PROVIDE, READ, SPEND
from x402mw.escrow.api import answers
from x402mw.escrow.api.queries import EscrowPage
from x402mw.escrow.api.redemption import judge
from x402mw.escrow.api.routes import Route, Routes
from x402mw.escrow.api.shared import (
    ON_ESCROW,
    change,
    find_caller,
    find_key,
    find_ledger,
    find_query,
    on_escrow,
    path_id,
    perform,
    respond,
)
from x402mw.escrow.errors import Refused, not_found
from x402mw.escrow.idempotency import Answer
from x402mw.escrow.ledger import Ledger, Operation
from x402mw.escrow.rules.values import MANUAL
from x402mw.escrow.transactions import Transaction


async def create_escrow(request: Request) -> Response:
    """POST /escrow: a session if it brings a session key, else a manual one."""
    value = await web.read_body(request)
    if "session_key" in value or "journal" in value:
        return await change(request, bodies.NewEscrow, sessions.create, status=201, value=value)
    return await change(request, manual_bodies.NewManual, manual.create, status=201, value=value)


async def list_escrows(request: Request) -> Response:
    """GET /escrow."""
    caller, ledger = find_caller(request), find_ledger(request)
    query = find_query(request, EscrowPage)
    if query.agent_id not in (None, caller):
        raise not_found()
    page = await ledger.read_of(
        caller,
        lambda db: sessions.show_all(
            db,
            caller,
            role=query.role,
            status=query.status,
            limit=query.limit,
            after=query.after,
        ),
    )
    return respond(request, Answer(200, dumps(page).decode()))


async def show_escrow(request: Request) -> Response:
    """GET /escrow/{id}."""
    caller, ledger = find_caller(request), find_ledger(request)
    escrow_id = path_id(request, "escrow_id", ids.ESCROW)

    async def show(connection: AsyncConnection) -> dict[str, Any]:
        escrow = await sessions.as_party(connection, caller, escrow_id)
        return await manual.show(connection, escrow)

    return respond(request, Answer(200, dumps(await ledger.read_of(caller, show)).decode()))


async def renew_token(request: Request) -> Response:
    """POST /escrow/{id}/token. It moves no money, so an idempotency key is not looked at."""
    caller = find_caller(request)
    escrow_id = path_id(request, "escrow_id", ids.ESCROW)
    web.parse(bodies.Body, await web.read_body(request))
    answer = await perform(request, lambda tx: sessions.renew_token(tx, caller, escrow_id))
    return respond(request, answer)


# What both kinds know, each in its own way.


async def _top_up(
    tx: Transaction, caller: str, escrow_id: str, body: manual_bodies.Grow
) -> dict[str, Any]:
    """Locks more."""
    if await _is_manual(tx, caller, escrow_id):
        return await manual.top_up(tx, caller, escrow_id, body.amount)
    return await sessions.top_up(tx, caller, escrow_id, body.amount)


async def _release(
    tx: Transaction, caller: str, escrow_id: str, body: manual_bodies.Pay
) -> dict[str, Any]:
    """Pays out by hand."""
    if await _is_manual(tx, caller, escrow_id):
        return await manual.release(tx, caller, escrow_id, body)
    if body.cumulative is None:
        raise Refused(422, "invalid_request", "a session is released up to a total: cumulative")
    escrow = await sessions.as_party(tx.connection, caller, escrow_id)
    manual.check_recipient(escrow, body.to_agent_id)
    return await sessions.release(tx, caller, escrow_id, atomic(body.cumulative // 1))


async def _extend(
    tx: Transaction, caller: str, escrow_id: str, body: manual_bodies.Extension
) -> dict[str, Any]:
    """Ends it later."""
    if await _is_manual(tx, caller, escrow_id):
        return await manual.extend(tx, caller, escrow_id, body.seconds)
    return await sessions.extend(tx, caller, escrow_id, body.seconds)


async def _is_manual(tx: Transaction, caller: str, escrow_id: str) -> bool:
    return (await sessions.as_party(tx.connection, caller, escrow_id)).kind == MANUAL


async def close(request: Request) -> Response:
    """POST /escrow/{id}/close, by either party; the operation tells them apart."""
    caller, ledger = find_caller(request), find_ledger(request)
    escrow_id = path_id(request, "escrow_id", ids.ESCROW)
    value = await web.read_body(request)
    body = web.parse(bodies.Close, value)
    if body.voucher is not None and body.amount is None:
        raise Refused(422, "invalid_request", "a voucher comes with the amount to redeem")
    operation = await _closing(ledger, caller, escrow_id, body)
    key = find_key(request, value)
    return respond(request, await perform(request, operation, key=key))


async def _closing(ledger: Ledger, caller: str, escrow_id: str, body: bodies.Close) -> Operation:
    # Its fields were validated as parts of another body, and the amount is atomic by now.
    item = bodies.RedemptionItem.model_construct(
        voucher=body.voucher, escrow_id=escrow_id, amount=body.amount or ZERO, final=True
    )
    judged = await judge(ledger, caller, [item])

    async def close_for(tx: Transaction) -> dict[str, Any]:
        escrow = await sessions.as_party(tx.connection, caller, escrow_id)
        if escrow.kind == MANUAL:
            return await manual.close(tx, caller, escrow)
        if caller == escrow.provider:
            proven = redemption.proven_by(judged[0], escrow_id)
            return sessions.close_as_provider(tx, escrow, proven)
        if body.voucher is not None or body.amount is not None:
            raise Refused(422, "invalid_request", "only the provider brings a voucher or amount")
        return sessions.close_as_buyer(tx, escrow)

    return close_for


_ANY = answers.Escrow | answers.ManualEscrow
_GROWN = answers.Session | answers.ManualEscrow
_PAYING = "not_covered expired unknown_milestone recipient_mismatch"

ROUTES: Routes = (
    Route(
        *("POST", "/escrow", SPEND, create_escrow),
        "Locks money for a provider: in a session if it brings a session key, else to release by"
        " hand.",
        _GROWN,
        bodies.NewEscrow | manual_bodies.NewManual,
        status=201,
        refusals="self_payment unknown_agent unknown_journal agent_revoked below_minimum"
        " insufficient_funds unknown_referral_code self_referral amount_out_of_range",
    ),
    Route(
        *("GET", "/escrow", READ, list_escrows),
        "Lists the escrows that you are a party of, newest first.",
        answers.Escrows,
        query=EscrowPage,
        refusals="not_found",
    ),
    Route(
        *("GET", "/escrow/{escrow_id}", READ, show_escrow),
        "Shows an escrow to its two parties.",
        _ANY,
    ),
    Route(
        *("POST", "/escrow/{escrow_id}/token", SPEND, renew_token),
        "Issues a fresh token of an open session.",
        answers.Session,
        bodies.Body,
        refusals=f"{ON_ESCROW} session_ending agent_revoked",
        keyed=False,
    ),
    on_escrow(
        *("topup", SPEND, manual_bodies.Grow, _top_up),
        "Locks more.",
        "insufficient_funds amount_out_of_range session_ending expired agent_revoked",
        answer=_GROWN,
    ),
    on_escrow(
        *("extend", SPEND, manual_bodies.Extension, _extend),
        "Lets it end so much later, within a year from now.",
        "expired",
        answer=_ANY,
    ),
    on_escrow(
        *("release", SPEND, manual_bodies.Pay, _release),
        "Pays the provider an amount, up to a total, a milestone, or all there is.",
        _PAYING,
        answer=_ANY,
    ),
    on_escrow(
        *("release-partial", SPEND, manual_bodies.PayPart, _release),
        "The same, but an amount must be named.",
        _PAYING,
        answer=_ANY,
    ),
    Route(
        *("POST", "/escrow/{escrow_id}/close", f"{SPEND} {PROVIDE}", close),
        "Ends it: for a session, a provider may bring its last voucher; the rest goes home.",
        _ANY,
        bodies.Close,
        refusals=f"{ON_ESCROW} not_covered {redemption.CODES}",
    ),
)

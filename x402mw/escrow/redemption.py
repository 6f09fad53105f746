"""Redeeming: a provider presents vouchers in a batch, each is judged alone, all move together.

Signatures are checked before the transaction, in threads, by the same function the provider
used. Several items of one session count as one: the largest total wins and every item is told the
state that followed. `docs/money.md` 4, `docs/escrow.md`.
"""

import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from anyio import CapacityLimiter, create_task_group
from anyio.to_thread import run_sync
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.core import ids
from x402mw.core.amounts import ZERO, Atomic, display
from x402mw.core.errors import Malformed
from x402mw.core.strict import b64url_decode
from x402mw.core.vouchers import SignedVoucher, parse_voucher, verify_voucher
from x402mw.escrow import agents, schema
from x402mw.escrow.bodies import Redemption, RedemptionItem
from x402mw.escrow.errors import Refused
from x402mw.escrow.rows import fetch_escrows
from x402mw.escrow.rules import session
from x402mw.escrow.rules.table import Event, InvalidState
from x402mw.escrow.rules.values import SESSION, Escrow, Phase
from x402mw.escrow.sets import among
from x402mw.escrow.thread import Work
from x402mw.escrow.transactions import Transaction

CHANGES_MAX = 1000
CHUNK_ITEMS = 125
CODES = "malformed wrong_network unknown_session signature voucher_required"
"""Of vouchers that do not count, beside `invalid_state`."""
_SessionKeys = dict[str, bytes]
Reading = Callable[[Work[_SessionKeys]], Awaitable[_SessionKeys]]
_CORES = CapacityLimiter(os.cpu_count() or 1)


class Claim(NamedTuple):
    """One item that may count: `proven` is min(y, cumulative), and its signature verified."""

    escrow_id: str
    proven: Atomic
    final: bool


class BadItem(NamedTuple):
    """One item that cannot count, and why; it never blocks the others."""

    code: str
    detail: str


class _Item(NamedTuple):
    """One item that can be read; without a voucher it only closes a session."""

    escrow_id: str
    signed: SignedVoucher | None
    amount: Atomic
    final: bool


# Before the transaction.


async def judge(
    read: Reading, caller: str, items: Sequence[RedemptionItem], network_id: bytes
) -> list[Claim | BadItem]:
    """Checks every item that needs no lock: form, network, owner and signature, in order.

    `read` does what needs a connection, which is given back before the long work begins.
    """
    read_items = await run_sync(lambda: [_read(item, network_id) for item in items])
    wanted = {item.escrow_id for item in read_items if isinstance(item, _Item)}
    keys = await read(lambda db: _session_keys(db, caller, wanted))
    verdicts: dict[int, list[Claim | BadItem]] = {}

    async def verify(start: int) -> None:
        chunk = read_items[start : start + CHUNK_ITEMS]
        verdicts[start] = await run_sync(
            lambda: [_verify(item, keys) for item in chunk], limiter=_CORES
        )

    # Verifying leaves the interpreter free, so each core takes chunks.
    async with create_task_group() as group:
        for start in range(0, len(read_items), CHUNK_ITEMS):
            group.start_soon(verify, start)
    return [verdict for start in sorted(verdicts) for verdict in verdicts[start]]


def _read(item: RedemptionItem, network_id: bytes) -> _Item | BadItem:
    if item.voucher is None:
        if item.amount or not item.final or item.escrow_id is None:
            return BadItem("voucher_required", "only a final amount of 0 needs no voucher")
        return _Item(item.escrow_id, None, ZERO, final=True)
    try:
        signed = parse_voucher(item.voucher)
    except Malformed as error:
        return BadItem("malformed", str(error))
    if signed.voucher.network != network_id:
        return BadItem("wrong_network", "the voucher is for another network")
    escrow_id = ids.format_id(ids.ESCROW, signed.voucher.session)
    if item.escrow_id not in (None, escrow_id):
        return BadItem("malformed", "escrow_id is not the session of the voucher")
    return _Item(escrow_id, signed, item.amount, item.final)


async def _session_keys(connection: AsyncConnection, caller: str, wanted: set[str]) -> _SessionKeys:
    """The session keys of those escrows that the caller is the provider of."""
    escrows = schema.escrows.c
    query = select(escrows.escrow_id, escrows.session_key).where(
        among(connection, escrows.escrow_id, sorted(wanted)),
        escrows.provider == caller,
        escrows.kind == SESSION,
    )
    rows = await connection.execute(query)
    return {escrow_id: b64url_decode(key, 32) for escrow_id, key in rows}


def _verify(item: _Item | BadItem, keys: _SessionKeys) -> Claim | BadItem:
    if isinstance(item, BadItem):
        return item
    if item.escrow_id not in keys:
        return BadItem("unknown_session", "you are not the provider of such a session")
    if item.signed is None:
        return Claim(item.escrow_id, ZERO, final=True)
    if not verify_voucher(item.signed, keys[item.escrow_id]):
        return BadItem("signature", "the session key did not sign this voucher")
    proven = min(item.amount, item.signed.voucher.cumulative)
    return Claim(item.escrow_id, proven, item.final)


# Inside the transaction.


async def redeem(
    tx: Transaction, caller: str, batch: Redemption, judged: Sequence[Claim | BadItem]
) -> dict[str, Any]:
    """Applies what was judged, one change for each session, and answers item by item."""
    highest = await agents.note_serial(tx, caller, batch.journal, batch.serial)
    totals = _combine(judged)
    named = among(tx.connection, schema.escrows.c.escrow_id, sorted(totals))
    query = select(schema.escrows).where(named)
    rows = await fetch_escrows(tx.connection, query)
    results = {row.escrow_id: _settle(tx, row, totals[row.escrow_id]) for row in rows}
    verdicts = (item if isinstance(item, BadItem) else results[item.escrow_id] for item in judged)
    return {"serial": highest, "items": [_describe(verdict) for verdict in verdicts]}


def _combine(judged: Sequence[Claim | BadItem]) -> dict[str, Claim]:
    totals: dict[str, Claim] = {}
    for item in judged:
        if isinstance(item, BadItem):
            continue
        other = totals.setdefault(item.escrow_id, item)
        if other is not item:
            most, final = max(item.proven, other.proven), item.final or other.final
            totals[item.escrow_id] = Claim(item.escrow_id, most, final)
    return totals


def _settle(tx: Transaction, before: Escrow, claim: Claim) -> Escrow | BadItem:
    # An ended session that already paid the claim is a repeated request, not a mistake.
    if before.phase is Phase.ENDED and min(claim.proven, before.amount) <= before.released:
        return before
    event = Event.PROVIDER_CLOSE if claim.final else Event.REDEEM
    change = session.close_by_provider if claim.final else session.redeem
    try:
        after = change(before, claim.proven)
    except InvalidState as error:
        return BadItem("invalid_state", str(error))
    return before if after == before else tx.save(before, after, event.value)


def _describe(verdict: Escrow | BadItem) -> dict[str, Any]:
    if isinstance(verdict, BadItem):
        return {"ok": False, "code": verdict.code, "detail": verdict.detail}
    return {
        "ok": True,
        "escrow_id": verdict.escrow_id,
        "redeemed": display(verdict.redeemed),
        "released": display(verdict.released),
        "deposit": display(verdict.amount),
        "state": verdict.status,
    }


def proven_by(judged: Claim | BadItem, escrow_id: str) -> Atomic:
    """What one voucher proves for one escrow, or `Refused`: the close of a provider."""
    if isinstance(judged, BadItem):
        raise Refused(422, judged.code, judged.detail)
    if judged.escrow_id != escrow_id:
        raise Refused(422, "unknown_session", "the voucher is for another session")
    return judged.proven


async def show_changes(
    tx: Transaction, caller: str, journal: str, *, serial: int, since: int, limit: int
) -> dict[str, Any]:
    """The sessions of a journal that changed after `since`, in the order of their last change."""
    highest = await agents.note_serial(tx, caller, journal, serial)
    escrows = schema.escrows.c
    query = select(schema.escrows).where(escrows.journal == journal, escrows.change > since)
    query = query.order_by(escrows.change).limit(limit)
    found = await fetch_escrows(tx.connection, query)
    return {
        "next": found[-1].change if found else since,
        "serial": highest,
        "changes": [_describe_change(escrow) for escrow in found],
    }


def _describe_change(escrow: Escrow) -> dict[str, Any]:
    return {
        "escrow_id": escrow.escrow_id,
        "state": escrow.status,
        "deposit": display(escrow.amount),
        "redeemed": display(escrow.redeemed),
        "released": display(escrow.released),
        "claim_until": escrow.claim_until,
    }

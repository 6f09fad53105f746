"""Session escrows from the buyer's side and the close from both: lock, token, release, close.

Every function is one operation inside one transaction (`ledger.perform`) and answers with the
escrow as its parties see it. `docs/money.md` 4 to 6; the API is in `docs/escrow.md`.
"""

import secrets
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from sqlalchemy import ColumnElement, select
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.core import ids
from x402mw.core.amounts import Atomic, display
from x402mw.core.strict import b64url_decode
from x402mw.core.tokens import SessionToken
from x402mw.escrow import access, agents, modes, referrals, schema
from x402mw.escrow.bodies import EXPIRES_SECONDS_MAX, NewEscrow
from x402mw.escrow.errors import Refused, not_found
from x402mw.escrow.events.ends import end_of_agent
from x402mw.escrow.rows import fetch_escrows, find_escrow
from x402mw.escrow.rules import session
from x402mw.escrow.rules.outage import is_due
from x402mw.escrow.rules.table import Event
from x402mw.escrow.rules.values import LIVE_STATUSES, OPEN_STATUSES, SESSION, Escrow
from x402mw.escrow.transactions import Transaction

LOOKED_AT_MAX = 2000
"""How many escrows one page looks at to find those in a state."""


def describe(escrow: Escrow) -> dict[str, Any]:
    """An escrow as its two parties see it: display amounts, whole seconds."""
    return {
        "escrow_id": escrow.escrow_id,
        "kind": escrow.kind,
        "status": escrow.status,
        "from_agent_id": escrow.buyer,
        "to_agent_id": escrow.provider,
        "asset": modes.shown(escrow.asset),
        "mode": modes.mode_of(escrow.asset),
        "amount": display(escrow.amount),
        "released": display(escrow.released),
        "redeemed": display(escrow.redeemed),
        "refunded": display(escrow.refunded),
        "returned": display(escrow.returned),
        "disputed": display(escrow.disputed),
        "remaining": display(escrow.remaining),
        "fee": display(escrow.fee),
        "session_key": escrow.session_key or None,
        "journal": escrow.journal,
        "memo": escrow.memo,
        "on_expiry": escrow.on_expiry,
        "created_at": escrow.created_at,
        "expires_at": escrow.expires_at,
        "claim_until": escrow.claim_until,
        "closing_deadline": escrow.closing_deadline,
        "close_reason": escrow.close_reason,
    }


async def create(tx: Transaction, buyer: str, wish: NewEscrow) -> dict[str, Any]:
    """Locks a buyer's money for one provider, and issues the first token."""
    asset = await _check_parties(tx, buyer, wish)
    empty = session.new_session(
        escrow_id=ids.format_id(ids.ESCROW, secrets.token_bytes(ids.ID_BYTES)),
        buyer=buyer,
        provider=wish.to_agent_id,
        asset=asset,
        fee_bps=tx.settings.fee_bps,
        referral_bps=tx.settings.referral_bps,
        referrer=await referrals.referrer_of(tx, wish.referral_code, buyer, wish.to_agent_id),
        session_key=wish.session_key,
        journal=wish.journal,
        memo=wish.memo,
        created_at=tx.now,
        expires_at=tx.now + wish.expires_in_seconds,
    )._replace(low_balance=wish.low_balance)
    await agents.check_funds(tx, buyer, wish.amount)
    locked, token = await _issue(tx, session.top_up(empty, wish.amount))
    return {**describe(tx.lock(empty, locked)), "token": token}


async def check_lock(tx: Transaction, buyer: str, provider: str, amount: Atomic) -> str:
    """Refuses a lock that is too small, or whose provider is nobody else; answers its asset."""
    if provider == buyer:
        raise Refused(422, "self_payment", "buyer and provider must be two agents")
    asset = await agents.meet(tx, buyer, provider)
    minimum = tx.settings.terms(modes.mode_of(asset)).min_escrow
    if amount < minimum:
        least = display(minimum)
        raise Refused(422, "below_minimum", f"an escrow locks at least {least}", minimum=least)
    return asset


async def _check_parties(tx: Transaction, buyer: str, wish: NewEscrow) -> str:
    asset = await check_lock(tx, buyer, wish.to_agent_id, wish.amount)
    journal = await agents.find_journal(tx.connection, wish.journal)
    if journal is None or journal.agent_id != wish.to_agent_id:
        raise Refused(404, "unknown_journal", "to_agent_id has not registered this journal")
    return asset


async def _issue(tx: Transaction, escrow: Escrow) -> tuple[Escrow, str]:
    """Issues a token for the state given, and notes until when its vouchers will count."""
    claim_seconds = tx.settings.claim_seconds
    exp = session.token_expiry(tx.now, escrow.expires_at, claim_seconds)
    if exp is None:
        raise Refused(409, "session_ending", "this session ends too soon for another token")
    after = session.issue_token(escrow, exp + claim_seconds)
    # A session has a journal; the database insists.
    journal_id = escrow.journal or ""
    journal = await agents.find_journal(tx.connection, journal_id)
    token = SessionToken(
        network=tx.settings.network,
        session=ids.parse_id(ids.ESCROW, escrow.escrow_id),
        pay_to=escrow.provider,
        journal=ids.parse_id(ids.JOURNAL, journal_id),
        session_key=b64url_decode(escrow.session_key, 32),
        receipt_key=b64url_decode(journal.receipt_key, 32),
        payer=escrow.buyer,
        asset=modes.shown(escrow.asset),
        deposit=escrow.amount,
        released=escrow.released,
        exp=exp,
        claim_until=exp + claim_seconds,
    )
    return after, tx.signer.sign_token(token)


async def renew_token(tx: Transaction, caller: str, escrow_id: str) -> dict[str, Any]:
    """Issues a fresh token of an open session."""
    before = await _as_buyer(tx, caller, escrow_id)
    await agents.meet(tx, caller, before.provider)
    after, token = await _issue(tx, before)
    return {**describe(tx.save(before, after, Event.TOKEN.value)), "token": token}


async def top_up(tx: Transaction, caller: str, escrow_id: str, amount: Atomic) -> dict[str, Any]:
    """Locks more in an open session, and issues a token that says so."""
    before = await _as_buyer(tx, caller, escrow_id)
    grown = session.top_up(before, amount)
    await agents.meet(tx, caller, before.provider)
    await agents.check_funds(tx, caller, amount)
    after, token = await _issue(tx, grown)
    said = {"claim_until": after.claim_until}
    return {**describe(tx.save(before, after, Event.TOP_UP.value, data=said)), "token": token}


async def extend(tx: Transaction, caller: str, escrow_id: str, seconds: int) -> dict[str, Any]:
    """Ends an open session so much later; never more than a year from now."""
    before = await _as_buyer(tx, caller, escrow_id)
    expires_at = before.expires_at + seconds
    after = session.extend(before, expires_at)
    if expires_at > tx.now + EXPIRES_SECONDS_MAX:
        raise Refused(422, "invalid_request", "a session ends within a year")
    return _keep(tx, before, after, Event.EXTEND, expires_at=expires_at)


async def release(
    tx: Transaction, caller: str, escrow_id: str, cumulative: Atomic
) -> dict[str, Any]:
    """Pays out by hand, up to a total; a total already reached changes nothing."""
    before = await _as_buyer(tx, caller, escrow_id)
    return _keep(tx, before, session.release(before, cumulative), Event.RELEASE)


def close_as_buyer(tx: Transaction, before: Escrow) -> dict[str, Any]:
    """Starts closing; ends at once when no voucher could be redeemed any more."""
    after, event = session.close_by_buyer(before, tx.now), Event.BUYER_CLOSE
    if is_due(after, tx.now, tx.service.up_since):
        after, event = session.reach_deadline(after), Event.DEADLINE
    return _keep(tx, before, after, event, closing_deadline=after.closing_deadline)


async def revoke_agent(tx: Transaction, agent_id: str, actor: str) -> dict[str, Any]:
    """Ends an agent, and starts closing what it still buys by vouchers."""
    answer = await access.revoke_agent(tx, agent_id, actor)
    closing = await _revoke_all(tx, agent_id, actor)
    await end_of_agent(tx, agent_id)
    return {**answer, "sessions_closing": closing}


async def _revoke_all(tx: Transaction, buyer: str, actor: str) -> int:
    """Vouchers that were signed before stay redeemable, so it costs no honest provider."""
    escrows = schema.escrows.c
    query = select(schema.escrows).where(
        *(escrows.buyer == buyer, escrows.due_at.is_not(None)),
        *(escrows.kind == SESSION, escrows.status.in_(OPEN_STATUSES)),
    )
    found = await fetch_escrows(tx.connection, query)
    for before in found:
        after = session.revoke(before, tx.now)
        said = {"closing_deadline": after.closing_deadline}
        tx.save(before, after, Event.REVOKE.value, actor=actor, data=said)
    return len(found)


def close_as_provider(tx: Transaction, before: Escrow, proven: Atomic) -> dict[str, Any]:
    """Redeems a last time and sends the rest home."""
    after = session.close_by_provider(before, proven)
    return _keep(tx, before, after, Event.PROVIDER_CLOSE)


def _keep(
    tx: Transaction, before: Escrow, after: Escrow, event: Event, **said: Any
) -> dict[str, Any]:
    if after == before:
        return describe(before)
    return describe(tx.save(before, after, event.value, data=said or None))


async def _as_buyer(tx: Transaction, caller: str, escrow_id: str) -> Escrow:
    escrow = await as_party(tx.connection, caller, escrow_id)
    if escrow.kind != SESSION:
        raise Refused(409, "wrong_kind", "a manual escrow has no tokens and no vouchers")
    if caller != escrow.buyer:
        raise Refused(403, "not_the_buyer", "only the buyer of this escrow may do that")
    return escrow


# Reading.


async def as_party(connection: AsyncConnection, caller: str, escrow_id: str) -> Escrow:
    """The escrow, if the caller is one of its two parties; to all others it does not exist."""
    escrow = await find_escrow(connection, escrow_id)
    if escrow is None or caller not in (escrow.buyer, escrow.provider):
        raise not_found()
    return escrow


async def show_all(
    connection: AsyncConnection,
    caller: str,
    *,
    role: str | None,
    status: str | None,
    limit: int,
    after: int | None,
) -> dict[str, Any]:
    """A page of the caller's escrows, newest first; `next` is the `after` of the next page.

    With a `status` a page ends after so many escrows that were looked at, found or not.
    """
    escrows = schema.escrows.c
    looked_at = [] if after is None else [escrows.opened < after]
    if status in LIVE_STATUSES:
        # What has ended is in no index of these.
        looked_at.append(escrows.due_at.is_not(None))
    parties = {"buyer": escrows.buyer == caller, "provider": escrows.provider == caller}
    mine = [[parties[name], *looked_at] for name in ((role,) if role else parties)]
    last = None if status is None else await _find_last(connection, mine)
    query = select(schema.escrows).order_by(escrows.opened.desc()).limit(limit + 1)
    if status is not None:
        query = query.where(escrows.status == status, escrows.opened >= (last or 0))
    found: list[Escrow] = []
    # One by one, as each has an index that is in order: together they would sort all there are.
    for conditions in mine:
        found += await fetch_escrows(connection, query.where(*conditions))
    found = sorted(found, key=attrgetter("opened"), reverse=True)[: limit + 1]
    page = found[:limit]
    more = page[-1].opened if len(found) > limit else last
    items = [describe(escrow) for escrow in page]
    return {"items": items, "next": None if more is None else str(more)}


async def _find_last(
    connection: AsyncConnection, mine: Sequence[Sequence[ColumnElement[bool]]]
) -> int | None:
    """Which escrow is the last that a page looks at; None if it looks at all."""
    opened = schema.escrows.c.opened
    nth = select(opened).order_by(opened.desc()).limit(1).offset(LOOKED_AT_MAX - 1)
    found = [
        (await connection.execute(nth.where(*conditions))).scalar_one_or_none()
        for conditions in mine
    ]
    return max((last for last in found if last is not None), default=None)

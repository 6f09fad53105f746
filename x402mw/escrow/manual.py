"""Manual escrows: lock, release, milestones, refunds, disputes, conditions, and what they show.

Every function is one operation inside one transaction (`ledger.perform`) and answers with the
escrow as its parties see it. Rules: `rules/manual.py` and `docs/money.md` 4 to 6.
"""

import hashlib
import hmac
import secrets
from collections.abc import Callable
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.core import ids
from x402mw.core.amounts import ZERO, Atomic, display
from x402mw.core.errors import Malformed
from x402mw.core.keys import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, verify
from x402mw.core.outcomes import outcome_message
from x402mw.core.strict import b64url_decode
from x402mw.escrow import agents, agreements, deadlines, manual_bodies, referrals
from x402mw.escrow.bodies import EXPIRES_SECONDS_MAX
from x402mw.escrow.errors import Refused, not_found
from x402mw.escrow.rows import find_escrow
from x402mw.escrow.rules import manual, money
from x402mw.escrow.rules.agreement import WHOLE, Agreement, Part
from x402mw.escrow.rules.outage import effective_deadline
from x402mw.escrow.rules.table import Event
from x402mw.escrow.rules.values import MANUAL, Escrow, Phase, new_escrow
from x402mw.escrow.sessions import as_party, check_lock, describe
from x402mw.escrow.transactions import Transaction

_SHA256, _ORACLE = "sha256:", "ed25519:"

Answer = dict[str, Any]
Change = Callable[[Agreement], Agreement]


# Creating.


async def create(tx: Transaction, buyer: str, wish: manual_bodies.NewManual) -> Answer:
    """Locks a buyer's money for one provider, to be released by hand."""
    asset = await check_lock(tx, buyer, wish.to_agent_id, wish.amount)
    payees = await _check_payees(tx, buyer, wish)
    empty = Agreement(
        escrow=new_escrow(
            escrow_id=ids.format_id(ids.ESCROW, secrets.token_bytes(ids.ID_BYTES)),
            kind=MANUAL,
            buyer=buyer,
            provider=wish.to_agent_id,
            asset=asset,
            fee_bps=tx.settings.fee_bps,
            referral_bps=tx.settings.referral_bps,
            referrer=await referrals.referrer_of(
                tx, wish.referral_code, buyer, wish.to_agent_id, payees
            ),
            payees=_write_payees(wish),
            memo=wish.memo,
            on_expiry=wish.after_expiry,
            created_at=tx.now,
            expires_at=tx.now + wish.seconds,
        )._replace(low_balance=wish.low_balance),
        parts=_parts(wish),
        review_seconds=wish.review_seconds,
    )
    await agents.check_funds(tx, buyer, wish.amount)
    locked = manual.top_up(empty, wish.amount)
    escrow = await agreements.create(tx, empty, locked, _write_condition(wish.condition))
    return await show(tx.connection, escrow, locked._replace(escrow=escrow))


async def _check_payees(tx: Transaction, buyer: str, wish: manual_bodies.NewManual) -> list[str]:
    for payee in wish.payees:
        if payee.agent_id == buyer:
            raise Refused(422, "self_payment", "the buyer cannot be one of the payees")
        await agents.meet(tx, buyer, payee.agent_id)
    return [payee.agent_id for payee in wish.payees]


def _write_payees(wish: manual_bodies.NewManual) -> str:
    if not wish.payees:
        return ""
    return money.write_payees((payee.agent_id, str(payee.fraction)) for payee in wish.payees)


def _parts(wish: manual_bodies.NewManual) -> tuple[Part, ...]:
    if not wish.milestones:
        return (Part(WHOLE, "", ZERO),)
    return tuple(
        Part(number, milestone.name, milestone.amount)
        for number, milestone in enumerate(wish.milestones, start=1)
    )


def _write_condition(condition: manual_bodies.Condition | None) -> str:
    if condition is None:
        return ""
    return (
        f"{_SHA256}{condition.sha256}" if condition.sha256 else f"{_ORACLE}{condition.oracle_key}"
    )


# By the buyer.


async def top_up(tx: Transaction, caller: str, escrow_id: str, amount: Atomic) -> Answer:
    """Locks more."""
    before = await as_buyer(tx, caller, escrow_id)
    grown = manual.top_up(before, amount)
    _check_time(tx, before, Event.TOP_UP)
    await agents.meet(tx, caller, before.escrow.provider)
    await agents.check_funds(tx, caller, amount)
    return await keep(tx, before, grown, Event.TOP_UP)


async def release(tx: Transaction, caller: str, escrow_id: str, wish: manual_bodies.Pay) -> Answer:
    """Pays an amount, up to a total, a milestone, or everything that is free."""
    before = await as_buyer(tx, caller, escrow_id)
    check_recipient(before.escrow, wish.to_agent_id)
    if wish.milestone is not None:
        number = find_part(before, wish.milestone).number
        approved = manual.approve(before, number)
        return await keep(tx, before, approved, Event.APPROVE, memo=wish.memo, part=number)
    return await keep(tx, before, _paid(before, wish), Event.RELEASE, memo=wish.memo)


def check_recipient(escrow: Escrow, named: str | None) -> None:
    """Refuses to pay when a request names somebody whom this escrow does not pay."""
    if named not in (None, escrow.provider):
        raise Refused(409, "recipient_mismatch", "an escrow pays its provider and nobody else")


def _paid(before: Agreement, wish: manual_bodies.Pay) -> Agreement:
    if wish.amount is not None:
        return manual.release(before, wish.amount)
    if wish.cumulative is not None:
        return manual.release_up_to(before, wish.cumulative)
    return manual.release_all(before)


async def settle(
    tx: Transaction, caller: str, escrow_id: str, wish: manual_bodies.Settlement
) -> Answer:
    """Pays one share and takes another back, at once."""
    before = await as_buyer(tx, caller, escrow_id)
    return await keep(tx, before, manual.settle(before, wish.release, wish.refund), Event.SETTLE)


async def approve(
    tx: Transaction, caller: str, escrow_id: str, wish: manual_bodies.Verdict
) -> Answer:
    """Pays a milestone."""
    before = await as_buyer(tx, caller, escrow_id)
    number = find_part(before, wish.milestone).number
    after = manual.approve(before, number)
    return await keep(tx, before, after, Event.APPROVE, part=number, reason=wish.reason)


async def reject(
    tx: Transaction, caller: str, escrow_id: str, wish: manual_bodies.Verdict
) -> Answer:
    """Does not take a delivery; the provider may deliver again."""
    before = await as_buyer(tx, caller, escrow_id)
    part = find_part(before, wish.milestone)
    after = manual.reject(before, part.number, tx.now)
    # A dispute over other money may keep a delivery waiting beyond the end of its review.
    if part.review_until is not None and _is_over(tx, part.review_until):
        raise Refused(409, "review_over", "reject is not possible after review_until")
    return await keep(tx, before, after, Event.REJECT, part=part.number, reason=wish.reason)


async def extend(tx: Transaction, caller: str, escrow_id: str, seconds: int) -> Answer:
    """Ends it so much later."""
    before = await as_buyer(tx, caller, escrow_id)
    _check_time(tx, before, Event.EXTEND)
    expires_at = before.escrow.expires_at + seconds
    if expires_at > tx.now + EXPIRES_SECONDS_MAX:
        raise Refused(422, "invalid_request", "an escrow ends within a year")
    after = manual.extend(before, expires_at)
    return await keep(tx, before, after, Event.EXTEND)


# By the provider, or by either.


async def deliver(
    tx: Transaction, caller: str, escrow_id: str, wish: manual_bodies.Delivery
) -> Answer:
    """Says with proof that a part is done; its review window starts."""
    before = await as_provider(tx, caller, escrow_id)
    _check_time(tx, before, Event.DELIVER)
    number = find_part(before, wish.milestone).number
    after = manual.deliver(before, number, wish.proof, tx.now)
    limit = manual_bodies.PROOFS_CHARACTERS_MAX
    # Who delivers without proof always may.
    if wish.proof and sum(len(part.proof) for part in after.parts) > limit:
        detail = f"proof: those of one escrow have at most {limit} characters together"
        raise Refused(422, "invalid_request", detail, limit=limit)
    return await keep(tx, before, after, Event.DELIVER, part=number)


async def refund(
    tx: Transaction, caller: str, escrow_id: str, wish: manual_bodies.TakeBack
) -> Answer:
    """Sends the buyer what is still held: by the buyer what was never delivered, else all."""
    before = await load(tx, caller, escrow_id)
    if caller == before.escrow.buyer:
        after, event = manual.refund(before, wish.amount), Event.REFUND
    else:
        after, event = manual.give_back(before, wish.amount), Event.GIVE_BACK
    return await keep(tx, before, after, event, memo=wish.memo)


async def close(tx: Transaction, caller: str, escrow: Escrow) -> Answer:
    """Ends it: all that is held goes home."""
    before = await agreements.load(tx.connection, escrow)
    event = Event.BUYER_CLOSE if caller == escrow.buyer else Event.PROVIDER_CLOSE
    return await keep(tx, before, manual.close(before, event), event)


async def meet_condition(
    tx: Transaction, caller: str, escrow_id: str, wish: manual_bodies.Outcome
) -> Answer:
    """Presents the outcome that was agreed on; anybody may, the proof is what counts."""
    await deadlines.apply_to_one(tx, escrow_id)
    escrow = await find_escrow(tx.connection, escrow_id)
    if escrow is None or escrow.kind != MANUAL:
        raise not_found()
    if await agents.asset_of(tx, caller) != escrow.asset:
        # Who trades in test money does not know of live money, nor the other way round.
        raise not_found()
    before = await agreements.load(tx.connection, escrow)
    row = await agreements.find_row(tx.connection, escrow_id)
    if not row.condition:
        if caller not in (escrow.buyer, escrow.provider):
            raise not_found()
        raise Refused(409, "no_condition", "this escrow was made without a condition")
    _check_outcome(row.condition, escrow_id, wish)
    _check_time(tx, before, Event.CONDITION)
    await keep(tx, before, manual.meet_condition(before), Event.CONDITION)
    return {"escrow_id": escrow_id, "met": True}


def _check_outcome(condition: str, escrow_id: str, wish: manual_bodies.Outcome) -> None:
    if condition.startswith(_SHA256):
        digest = hashlib.sha256(wish.outcome.encode()).hexdigest()
        met = hmac.compare_digest(digest, condition.removeprefix(_SHA256))
    else:
        met = _is_signed(condition.removeprefix(_ORACLE), escrow_id, wish)
    if not met:
        raise Refused(409, "condition_not_met", "this is not the outcome that was agreed on")


def _is_signed(key: str, escrow_id: str, wish: manual_bodies.Outcome) -> bool:
    try:
        signature = b64url_decode(wish.signature or "", SIGNATURE_BYTES)
    except Malformed:
        return False
    message = outcome_message(ids.parse_id(ids.ESCROW, escrow_id), wish.outcome)
    return verify(b64url_decode(key, PUBLIC_KEY_BYTES), message, signature)


async def give_money_back(tx: Transaction, caller: str, escrow_id: str, amount: Atomic) -> Answer:
    """The provider returns what it was paid, from its own account, also after the end."""
    escrow = await as_party(tx.connection, caller, escrow_id)
    if caller != escrow.provider:
        raise Refused(403, "not_the_provider", "only the provider of this escrow may do that")
    after = money.give_money_back(escrow, amount)
    await agents.check_funds(tx, caller, amount)
    return await show(tx.connection, tx.save(escrow, after, Event.RETURN.value))


# What the operations share.


async def load(tx: Transaction, caller: str, escrow_id: str) -> Agreement:
    """The agreement of a manual escrow that the caller is a party of."""
    escrow = await as_party(tx.connection, caller, escrow_id)
    if escrow.kind != MANUAL:
        raise Refused(409, "wrong_kind", "a session is paid by vouchers, not in this way")
    return await agreements.load(tx.connection, escrow)


async def as_buyer(tx: Transaction, caller: str, escrow_id: str) -> Agreement:
    """The agreement, if the caller is its buyer."""
    found = await load(tx, caller, escrow_id)
    if caller != found.escrow.buyer:
        raise Refused(403, "not_the_buyer", "only the buyer of this escrow may do that")
    return found


async def as_provider(tx: Transaction, caller: str, escrow_id: str) -> Agreement:
    """The agreement, if the caller is its provider."""
    found = await load(tx, caller, escrow_id)
    if caller != found.escrow.provider:
        raise Refused(403, "not_the_provider", "only the provider of this escrow may do that")
    return found


def _check_time(tx: Transaction, agreement: Agreement, event: Event) -> None:
    """What is only possible before the end (T1): a dispute may hold money beyond it."""
    escrow = agreement.escrow
    if escrow.phase is not Phase.ENDED and _is_over(tx, escrow.expires_at):
        raise Refused(409, "expired", f"{event.value} is not possible after expires_at")


def _is_over(tx: Transaction, deadline: int) -> bool:
    return tx.now >= effective_deadline(deadline, tx.service.up_since)


def find_part(agreement: Agreement, name: str | None) -> Part:
    """The milestone of this name, or the one part there is."""
    if name is None and len(agreement.parts) == 1:
        return agreement.parts[0]
    for part in agreement.parts:
        if name is not None and part.name == name:
            return part
    names = [part.name for part in agreement.parts if part.number != WHOLE]
    raise Refused(422, "unknown_milestone", "milestone names one of the escrow's", names=names)


async def keep(
    tx: Transaction, before: Agreement, after: Agreement, event: Event, **said: Any
) -> Answer:
    """Writes what an operation came to, and shows it; nothing changed is nothing written.

    What had only waited for it, as a deadline does for the end of a dispute, happens at once.
    """
    if after == before:
        return await show(tx.connection, before.escrow, before)
    kept = await agreements.keep(tx, before, after, event, **said)
    kept = await agreements.pass_time(tx, kept, tx.now, since=tx.now)
    return await show(tx.connection, kept.escrow, kept)


# Reading.


async def show(
    connection: AsyncConnection, escrow: Escrow, agreement: Agreement | None = None
) -> Answer:
    """An escrow of either kind as its parties see it, with all that its kind has."""
    if escrow.kind != MANUAL:
        return describe(escrow)
    agreement = agreement or await agreements.load(connection, escrow)
    return {**describe(escrow), **_describe_agreement(agreement)}


def _describe_agreement(agreement: Agreement) -> Answer:
    dispute = agreement.dispute
    return {
        "carried_units": str(agreement.carry),
        "review_seconds": agreement.review_seconds,
        "milestones": [_describe_part(part) for part in agreement.parts if part.number != WHOLE],
        "delivery": next(
            (_describe_part(part) for part in agreement.parts if part.number == WHOLE), None
        ),
        "dispute": dispute
        and {
            "number": dispute.number,
            "opened_by": dispute.opener,
            "amount": display(agreement.escrow.disputed),
            "opened_at": dispute.opened_at,
            "deadline": dispute.deadline,
        },
    }


def _describe_part(part: Part) -> Answer:
    return {
        "name": part.name,
        "amount": display(part.amount),
        "state": part.state.value,
        "proof": part.proof,
        "review_until": part.review_until,
    }

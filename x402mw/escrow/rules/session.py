"""Sessions: vouchers move R, L only grows, and nothing goes home before the close.

    create ──> open ──buyer close──> closing
                │ └──provider close──┐  │ └──provider close──┐
                └──deadline──────────┴──┴──deadline──────────┴──> ended

`open` is written "locked" or "partially_released", `ended` is "released", "refunded" or "settled".
"""

from typing import Any

from x402mw.core.amounts import Atomic, atomic
from x402mw.core.tokens import TOKEN_SECONDS
from x402mw.escrow.rules import table
from x402mw.escrow.rules.money import raised
from x402mw.escrow.rules.table import Event
from x402mw.escrow.rules.values import REFUND, SESSION, Escrow, Phase, ended_status, new_escrow


def top_up(escrow: Escrow, amount: Atomic) -> Escrow:
    """Locks more: L grows."""
    return _happen(escrow, Event.TOP_UP, amount=atomic(escrow.amount + amount))


def issue_token(escrow: Escrow, claim_until: int) -> Escrow:
    """Notes that a token was issued whose vouchers are redeemable until `claim_until`."""
    newest = max(claim_until, escrow.claim_until or 0)
    return _happen(escrow, Event.TOKEN, claim_until=newest)


def release(escrow: Escrow, cumulative: Atomic) -> Escrow:
    """The buyer pays out by hand: R := max(R, min(cumulative, L))."""
    return _happen(escrow, Event.RELEASE, **_raise_released(escrow, cumulative))


def redeem(escrow: Escrow, proven: Atomic) -> Escrow:
    """The provider proves a total: R := max(R, min(y, cumulative, L)); `proven` is the min."""
    return _happen(escrow, Event.REDEEM, **_raise_redeemed(escrow, proven))


def close_by_buyer(escrow: Escrow, now: int) -> Escrow:
    """Stops tokens and top-ups; vouchers stay good until the newest token's `claim_until`."""
    deadline = now if escrow.claim_until is None else escrow.claim_until
    return _happen(escrow, Event.BUYER_CLOSE, closing_deadline=deadline, close_reason="buyer_close")


def revoke(escrow: Escrow, now: int) -> Escrow:
    """The owner takes the buyer's right to go on; otherwise as the buyer's own close."""
    deadline = now if escrow.claim_until is None else escrow.claim_until
    return _happen(escrow, Event.REVOKE, closing_deadline=deadline, close_reason="revoked")


def close_by_provider(escrow: Escrow, proven: Atomic) -> Escrow:
    """Redeems for the last time and sends the rest home at once."""
    raised = _raise_redeemed(escrow, proven)
    rest = atomic(escrow.amount - raised["released"])
    return _happen(
        escrow, Event.PROVIDER_CLOSE, **raised, refunded=rest, close_reason="provider_close"
    )


def reach_deadline(escrow: Escrow) -> Escrow:
    """Sends the rest home because the time is over (T3: a session always refunds)."""
    reason = escrow.close_reason or "expired_refund"
    rest = atomic(escrow.amount - escrow.released)
    return _happen(escrow, Event.DEADLINE, refunded=rest, close_reason=reason)


def extend(escrow: Escrow, expires_at: int) -> Escrow:
    """Ends it later; never earlier (T4)."""
    return _happen(escrow, Event.EXTEND, expires_at=max(escrow.expires_at, expires_at))


def _happen(before: Escrow, event: Event, **changes: Any) -> Escrow:
    """The escrow after an event that changes these fields, or a refusal."""
    table.check(before, event)
    phase = _AFTER.get(event, before.phase)
    released = changes.get("released", before.released)
    amount = changes.get("amount", before.amount)
    closing = changes.get("closing_deadline", before.closing_deadline)
    deadline = closing or changes.get("expires_at", before.expires_at)
    changes["status"], changes["due_at"] = standing(phase, released, amount, deadline)
    # One copy and not two: a batch makes thousands.
    return before._replace(**changes)


_AFTER = {
    Event.BUYER_CLOSE: Phase.CLOSING,
    Event.REVOKE: Phase.CLOSING,
    Event.PROVIDER_CLOSE: Phase.ENDED,
    Event.DEADLINE: Phase.ENDED,
}


def standing(phase: Phase, released: int, amount: int, deadline: int) -> tuple[str, int | None]:
    """The status of a session in a phase, and when time does something to it."""
    if phase is Phase.OPEN:
        return "partially_released" if released else "locked", deadline
    if phase is Phase.CLOSING:
        return "closing", deadline
    return ended_status(amount, released), None


def _raise_released(escrow: Escrow, cumulative: Atomic) -> dict[str, Atomic]:
    return raised(escrow, max(escrow.released, min(cumulative, escrow.amount)))


def _raise_redeemed(escrow: Escrow, proven: Atomic) -> dict[str, Atomic]:
    redeemed = max(escrow.redeemed, min(proven, escrow.amount))
    return {**_raise_released(escrow, Atomic(redeemed)), "redeemed": Atomic(redeemed)}


# Time.


def token_expiry(now: int, expires_at: int, claim_seconds: int) -> int | None:
    """When a token issued now expires, or None in the last seconds of a session (T4).

    Its vouchers stay redeemable for `claim_seconds` more, which never reaches past `expires_at`.
    """
    exp = min(now + TOKEN_SECONDS, expires_at - claim_seconds)
    return exp if exp > now else None


def new_session(
    *,
    escrow_id: str,
    buyer: str,
    provider: str,
    asset: str,
    fee_bps: int,
    session_key: str,
    journal: str,
    memo: str,
    created_at: int,
    expires_at: int,
    referrer: str = "",
    referral_bps: int = 0,
) -> Escrow:
    """An empty session escrow; the first `top_up` locks its money."""
    return new_escrow(
        escrow_id=escrow_id,
        kind=SESSION,
        buyer=buyer,
        provider=provider,
        asset=asset,
        fee_bps=fee_bps,
        referral_bps=referral_bps,
        referrer=referrer,
        session_key=session_key,
        journal=journal,
        memo=memo,
        on_expiry=REFUND,
        created_at=created_at,
        expires_at=expires_at,
    )

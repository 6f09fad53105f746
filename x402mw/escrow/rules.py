"""What an escrow may do, as pure functions: state and event in, state out.

Rules M1, 3, 4, 5 and 6 of `docs/money.md`. Nothing here reads a clock or a database. An operation
makes a new `Escrow` from an old one, and `transfers` tells which money that difference moves, so
the books can never disagree with the state.

    create ──> open ──buyer close──> closing
                │ └──provider close──┐  │ └──provider close──┐
                └──deadline──────────┴──┴──deadline──────────┴──> ended

`open` is written "locked" or "partially_released", `ended` is "released", "refunded" or "settled".
"""

from collections.abc import Iterable
from enum import Enum
from typing import Any, NamedTuple

from x402mw.core.amounts import ZERO, Atomic, atomic
from x402mw.core.tokens import TOKEN_SECONDS

BPS = 10_000
UP_GRACE_SECONDS = 600
"""After an outage every session deadline leaves at least this long to present vouchers (T5)."""

WORLD, FAUCET, HOUSE = "world", "faucet", "house:fees"

SESSION = "session"
"""The one kind of escrow built so far; `manual` is the other that `docs/money.md` 4 describes."""


class Phase(Enum):
    """What may still happen to a session."""

    OPEN = "open"
    CLOSING = "closing"
    ENDED = "ended"


class Event(Enum):
    """What can happen to a session; the value is the kind of the entry it writes in the books."""

    TOP_UP = "top_up"
    TOKEN = "token"  # noqa: S105 (the name of an event)
    RELEASE = "release"
    REDEEM = "redeem"
    BUYER_CLOSE = "buyer_close"
    PROVIDER_CLOSE = "provider_close"
    DEADLINE = "deadline"


TRANSITIONS = {
    (Phase.OPEN, Event.TOP_UP): Phase.OPEN,
    (Phase.OPEN, Event.TOKEN): Phase.OPEN,
    (Phase.OPEN, Event.RELEASE): Phase.OPEN,
    (Phase.OPEN, Event.REDEEM): Phase.OPEN,
    (Phase.OPEN, Event.BUYER_CLOSE): Phase.CLOSING,
    (Phase.OPEN, Event.PROVIDER_CLOSE): Phase.ENDED,
    (Phase.OPEN, Event.DEADLINE): Phase.ENDED,
    (Phase.CLOSING, Event.REDEEM): Phase.CLOSING,
    (Phase.CLOSING, Event.PROVIDER_CLOSE): Phase.ENDED,
    (Phase.CLOSING, Event.DEADLINE): Phase.ENDED,
}
"""Everything a session can do; whatever is not here is refused (`docs/money.md` 5)."""

OPEN_STATUSES = ("locked", "partially_released")
LIVE_STATUSES = (*OPEN_STATUSES, "closing")
ENDED_STATUSES = ("released", "refunded", "settled")
STATUSES = (*LIVE_STATUSES, *ENDED_STATUSES)


class InvalidState(Exception):
    """The transition table has no such event in this state."""

    def __init__(self, status: str, event: Event) -> None:
        """`status` is what the escrow is in, `event` what was asked of it."""
        super().__init__(f"{event.value} is not possible while the escrow is {status}")
        self.status = status
        self.event = event


class Escrow(NamedTuple):
    """One escrow; a tuple, because a batch makes thousands of them.

    Amounts are atomic, times whole seconds; L, R and F of the rules are named.

    `amount` L is what was locked in all, `released` R the gross paid out, `refunded` F what went
    back, `redeemed` the most the provider proved. `opened` and `change` are numbers of the change
    sequence: at creation, and newest.
    """

    escrow_id: str
    kind: str
    status: str
    buyer: str
    provider: str
    asset: str
    amount: Atomic
    released: Atomic
    redeemed: Atomic
    refunded: Atomic
    fee: Atomic
    referral: Atomic
    fee_bps: int
    referral_bps: int
    session_key: str
    journal: str
    memo: str
    on_expiry: str
    created_at: int
    expires_at: int
    claim_until: int | None
    closing_deadline: int | None
    close_reason: str | None
    opened: int
    change: int

    @property
    def remaining(self) -> int:
        """What the escrow still holds: L - R - F."""
        return self.amount - self.released - self.refunded

    @property
    def account(self) -> str:
        """The account that holds this escrow's money."""
        return f"escrow:{self.escrow_id}"

    @property
    def phase(self) -> Phase:
        """The row of the transition table this escrow is in."""
        if self.status in OPEN_STATUSES:
            return Phase.OPEN
        return Phase.CLOSING if self.status == "closing" else Phase.ENDED

    @property
    def deadline(self) -> int:
        """When the rest goes home by itself, outages apart."""
        return self.expires_at if self.closing_deadline is None else self.closing_deadline


CHANGING = (
    *("status", "amount", "released", "redeemed", "refunded", "fee", "referral"),
    *("claim_until", "closing_deadline", "close_reason", "change"),
)
"""The fields that an event may change; all others stay as they were at creation."""


class Transfer(NamedTuple):
    """One line of an entry: `amount` > 0 moves between two accounts, so entries always balance."""

    source: str
    target: str
    amount: Atomic


def agent_account(agent_id: str) -> str:
    """Names the account of an agent."""
    return f"agent:{agent_id}"


# Operations: an escrow in, the escrow after it out, or `InvalidState`.


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


def _happen(before: Escrow, event: Event, **changes: Any) -> Escrow:
    """The escrow after an event that changes these fields, or a refusal."""
    phase = TRANSITIONS.get((before.phase, event))
    if phase is None:
        raise InvalidState(before.status, event)
    released = changes.get("released", before.released)
    status = _status(phase, released, changes.get("amount", before.amount))
    return before._replace(**changes, status=status)


def _status(phase: Phase, released: int, amount: int) -> str:
    if phase is Phase.OPEN:
        return "partially_released" if released else "locked"
    if phase is Phase.CLOSING:
        return "closing"
    if not released:
        return "refunded"
    return "released" if released == amount else "settled"


def _raise_released(escrow: Escrow, cumulative: Atomic) -> dict[str, Atomic]:
    released = max(escrow.released, min(cumulative, escrow.amount))
    fee, referral = split_fee(released, escrow.fee_bps, escrow.referral_bps)
    return {"released": released, "fee": fee, "referral": referral}


def _raise_redeemed(escrow: Escrow, proven: Atomic) -> dict[str, Atomic]:
    redeemed = max(escrow.redeemed, min(proven, escrow.amount))
    return {**_raise_released(escrow, redeemed), "redeemed": redeemed}


# Money.


def split_fee(released: Atomic, fee_bps: int, referral_bps: int = 0) -> tuple[Atomic, Atomic]:
    """The fee and the referral within it, on everything ever released from one escrow.

    Rounding the running total, never one release, makes the fee the same for any splitting of the
    same amount (`docs/money.md` 3).
    """
    fee = released * fee_bps // BPS
    return atomic(fee), atomic(fee * referral_bps // BPS)


def transfers(before: Escrow, after: Escrow) -> list[Transfer]:
    """Which money one operation moves: the difference of two states of one escrow."""
    fee = after.fee - before.fee
    buyer = agent_account(after.buyer)
    moves = (
        (buyer, after.account, after.amount - before.amount),
        (after.account, agent_account(after.provider), after.released - before.released - fee),
        (after.account, HOUSE, fee),
        (after.account, buyer, after.refunded - before.refunded),
    )
    return [Transfer(source, target, atomic(moved)) for source, target, moved in moves if moved]


def balance_changes(moves: Iterable[Transfer]) -> dict[str, int]:
    """Adds transfers up to one signed change per account."""
    changes: dict[str, int] = {}
    for move in moves:
        changes[move.source] = changes.get(move.source, 0) - move.amount
        changes[move.target] = changes.get(move.target, 0) + move.amount
    return changes


# Time.


def token_expiry(now: int, expires_at: int, claim_seconds: int) -> int | None:
    """When a token issued now expires, or None in the last seconds of a session (T4).

    Its vouchers stay redeemable for `claim_seconds` more, which never reaches past `expires_at`.
    """
    exp = min(now + TOKEN_SECONDS, expires_at - claim_seconds)
    return exp if exp > now else None


def effective_deadline(deadline: int, up_since: int) -> int:
    """When a deadline really applies: an escrow that was down gives everyone time (T5)."""
    return max(deadline, up_since + UP_GRACE_SECONDS)


def is_due(escrow: Escrow, now: int, up_since: int) -> bool:
    """Tells whether the rest of a live escrow must go home now (T1: valid iff now < deadline)."""
    if escrow.phase is Phase.ENDED:
        return False
    return now >= effective_deadline(escrow.deadline, up_since)


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
) -> Escrow:
    """An empty session escrow; the first `top_up` locks its money."""
    return Escrow(
        escrow_id=escrow_id,
        kind=SESSION,
        status="locked",
        buyer=buyer,
        provider=provider,
        asset=asset,
        amount=ZERO,
        released=ZERO,
        redeemed=ZERO,
        refunded=ZERO,
        fee=ZERO,
        referral=ZERO,
        fee_bps=fee_bps,
        referral_bps=0,
        session_key=session_key,
        journal=journal,
        memo=memo,
        on_expiry="refund",
        created_at=created_at,
        expires_at=expires_at,
        claim_until=None,
        closing_deadline=None,
        close_reason=None,
        opened=0,
        change=0,
    )

"""The values the rules speak of: an escrow, its status, and a movement of money."""

from enum import Enum
from typing import NamedTuple

from x402mw.core.amounts import ZERO, Atomic

MANUAL, SESSION = "manual", "session"
"""The two kinds of escrow: the buyer releases by hand, or vouchers do."""

RELEASE, REFUND = "release", "refund"
"""What `on_expiry` may say: who gets the rest of a manual escrow when its time is over."""

OPEN_STATUSES = ("locked", "partially_released")
LIVE_STATUSES = (*OPEN_STATUSES, "delivered", "disputed", "closing")
ENDED_STATUSES = ("released", "refunded", "settled")


class Phase(Enum):
    """What may still happen to an escrow: the rows of the transition table."""

    OPEN = "open"
    DELIVERED = "delivered"
    DISPUTED = "disputed"
    CLOSING = "closing"
    ENDED = "ended"


_PHASES = {
    **dict.fromkeys(OPEN_STATUSES, Phase.OPEN),
    **dict.fromkeys(ENDED_STATUSES, Phase.ENDED),
    **{phase.value: phase for phase in (Phase.DELIVERED, Phase.DISPUTED, Phase.CLOSING)},
}


class Escrow(NamedTuple):
    """One escrow; a tuple, because a batch makes thousands of them.

    Amounts are atomic, times whole seconds; L, R, F and D of the rules are named.

    `amount` L is what was locked in all, `released` R the gross paid out, `refunded` F what went
    back, `disputed` D what a dispute holds; `redeemed` is the most the provider proved by vouchers,
    `returned` what the provider gave back from its own account. `payees` is a revenue split as
    `money.write_payees` makes it, or empty. `due_at` is when time next does something to it.
    `opened` and `change` are numbers of the change sequence: at creation, and newest. `last_entry`
    is the newest entry about it in the books, and `low_balance` what it warns at when less remains
    (by default a tenth of what was locked first).
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
    disputed: Atomic
    returned: Atomic
    fee: Atomic
    referral: Atomic
    fee_bps: int
    referral_bps: int
    referrer: str
    payees: str
    session_key: str
    journal: str | None
    memo: str
    on_expiry: str
    created_at: int
    expires_at: int
    claim_until: int | None
    closing_deadline: int | None
    due_at: int | None
    close_reason: str | None
    opened: int
    change: int
    last_entry: int | None = None
    low_balance: int | None = None

    @property
    def remaining(self) -> Atomic:
        """What the escrow still holds: L - R - F."""
        return Atomic(self.amount - self.released - self.refunded)

    @property
    def free(self) -> Atomic:
        """What it holds outside of a dispute: L - R - F - D."""
        return Atomic(self.remaining - self.disputed)

    @property
    def account(self) -> str:
        """The account that holds this escrow's money."""
        return escrow_account(self.escrow_id)

    @property
    def phase(self) -> Phase:
        """The row of the transition table this escrow is in."""
        return _PHASES[self.status]


CHANGING = (
    *("status", "amount", "released", "redeemed", "refunded", "disputed", "returned"),
    *("fee", "referral", "expires_at", "claim_until", "closing_deadline", "due_at"),
    *("close_reason", "change", "last_entry"),
)
"""The fields that an event may change; all others stay as they were at creation."""

PAYING = ("status", "released", "redeemed", "fee", "referral", "change", "last_entry")
"""Those of them that a payment changes which ends nothing: they are in no index but one."""


class Transfer(NamedTuple):
    """One line of an entry: `amount` > 0 moves between two accounts, so entries always balance."""

    source: str
    target: str
    amount: Atomic


def escrow_account(escrow_id: str) -> str:
    """Names the account that holds an escrow's money."""
    return f"escrow:{escrow_id}"


def agent_account(agent_id: str) -> str:
    """Names the account of an agent."""
    return f"agent:{agent_id}"


def ended_status(amount: int, released: int) -> str:
    """How an ended escrow is called: by who got what was locked."""
    if not released:
        return "refunded"
    return "released" if released == amount else "settled"


def new_escrow(
    *,
    escrow_id: str,
    kind: str,
    buyer: str,
    provider: str,
    asset: str,
    fee_bps: int,
    memo: str,
    on_expiry: str,
    created_at: int,
    expires_at: int,
    referral_bps: int = 0,
    referrer: str = "",
    payees: str = "",
    session_key: str = "",
    journal: str | None = None,
) -> Escrow:
    """An empty escrow of either kind; the first `top_up` locks its money."""
    return Escrow(
        escrow_id=escrow_id,
        kind=kind,
        status="locked",
        buyer=buyer,
        provider=provider,
        asset=asset,
        amount=ZERO,
        released=ZERO,
        redeemed=ZERO,
        refunded=ZERO,
        disputed=ZERO,
        returned=ZERO,
        fee=ZERO,
        referral=ZERO,
        fee_bps=fee_bps,
        referral_bps=referral_bps if referrer else 0,
        referrer=referrer,
        payees=payees,
        session_key=session_key,
        journal=journal,
        memo=memo,
        on_expiry=on_expiry,
        created_at=created_at,
        expires_at=expires_at,
        claim_until=None,
        closing_deadline=None,
        due_at=expires_at,
        close_reason=None,
        opened=0,
        change=0,
    )

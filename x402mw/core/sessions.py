"""The provider's account of one session: admit, charge, void, close.

Rules (`docs/protocol.md`, Accounts):

1. `charged + reserved + max <= max(best, cumulative) <= deposit` admits a call. The order in which
   vouchers arrive does not matter, so any number of calls may be in flight.
2. What was reserved becomes a charge of at most that, or nothing; it never lapses by itself.
3. Nothing here ever falls but `reserved`: charged, best and deposit only grow.
4. Always `redeemed <= charged <= best <= deposit`.

    open --close--> closing --closed at the escrow--> closed
"""

from dataclasses import dataclass, replace
from enum import StrEnum

from x402mw.core.amounts import ZERO, Atomic
from x402mw.core.errors import RemoteError


class SessionState(StrEnum):
    """Where a session stands in this provider's journal."""

    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


class SessionEvent(StrEnum):
    """What may happen to a session's state."""

    ADMIT = "admit"
    SETTLE = "settle"
    CLOSE = "close"
    CLOSED = "closed"


TRANSITIONS = {
    (SessionState.OPEN, SessionEvent.ADMIT): SessionState.OPEN,
    (SessionState.OPEN, SessionEvent.SETTLE): SessionState.OPEN,
    (SessionState.OPEN, SessionEvent.CLOSE): SessionState.CLOSING,
    (SessionState.OPEN, SessionEvent.CLOSED): SessionState.CLOSED,
    (SessionState.CLOSING, SessionEvent.SETTLE): SessionState.CLOSING,
    (SessionState.CLOSING, SessionEvent.CLOSE): SessionState.CLOSING,
    (SessionState.CLOSING, SessionEvent.CLOSED): SessionState.CLOSED,
    (SessionState.CLOSED, SessionEvent.SETTLE): SessionState.CLOSED,
    (SessionState.CLOSED, SessionEvent.CLOSE): SessionState.CLOSED,
    (SessionState.CLOSED, SessionEvent.CLOSED): SessionState.CLOSED,
}
"""Every legal step; a pair that is not here is refused. Open calls still settle after a close."""


class NotCovered(RemoteError):
    """The vouchers of a session do not cover one more call, or exceed its deposit."""

    code = "cover"


class SessionEnded(RemoteError):
    """The session takes no new calls."""

    code = "session_ended"


@dataclass(frozen=True, slots=True)
class Account:
    """The money side of a session, in atomic units.

    `best` is the highest cumulative amount of any voucher accepted; `charged` was earned,
    `reserved` is held by calls that still run. `deposit` is the largest any token showed.
    """

    deposit: Atomic = ZERO
    best: Atomic = ZERO
    charged: Atomic = ZERO
    reserved: Atomic = ZERO
    state: SessionState = SessionState.OPEN


def move(account: Account, event: SessionEvent) -> Account:
    """Applies an event to the session's state, or raises `SessionEnded`."""
    state = TRANSITIONS.get((account.state, event))
    if state is None:
        raise SessionEnded(f"the session is {account.state}")
    return account if state is account.state else replace(account, state=state)


def admit(account: Account, *, cumulative: Atomic, amount: Atomic, deposit: Atomic) -> Account:
    """Reserves `amount` for one call under a voucher of `cumulative` (rule 1).

    `deposit` is what the call's token shows; the larger of two tokens holds. Raises `NotCovered` or
    `SessionEnded`, and then nothing has changed.
    """
    account = move(account, SessionEvent.ADMIT)
    deposit = max(account.deposit, deposit)
    best = max(account.best, cumulative)
    if best > deposit:
        raise NotCovered("the voucher is for more than the session's deposit")
    if account.charged + account.reserved + amount > best:
        raise NotCovered("the vouchers of this session do not cover this call")
    reserved = Atomic(account.reserved + amount)
    return Account(deposit, best, account.charged, reserved, account.state)


def settle(account: Account, *, reserved: Atomic, charge: Atomic) -> Account:
    """Turns one call's reservation into a charge of at most that; 0 voids it (rule 2)."""
    if not 0 <= charge <= reserved <= account.reserved:
        raise ValueError("a charge lies between nothing and what the call reserved")
    account = move(account, SessionEvent.SETTLE)
    charged, reserved = Atomic(account.charged + charge), Atomic(account.reserved - reserved)
    return Account(account.deposit, account.best, charged, reserved, account.state)

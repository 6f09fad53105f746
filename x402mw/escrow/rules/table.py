"""The transition table: what may happen to an escrow of each kind, in each phase.

Whatever is not here is refused (`docs/money.md` 5). Guards on amounts and on who asks stand with
the operations.
"""

from enum import Enum

from x402mw.escrow.rules.values import MANUAL, SESSION, Escrow, Phase


class Event(Enum):
    """What can happen to an escrow; the value is the kind of the entry it writes in the books."""

    TOP_UP = "top_up"
    TOKEN = "token"  # noqa: S105 (the name of an event)
    EXTEND = "extend"
    RELEASE = "release"
    REDEEM = "redeem"
    SETTLE = "settle"
    CONDITION = "condition"
    DELIVER = "deliver"
    APPROVE = "approve"
    REJECT = "reject"
    REVIEW_END = "review_end"
    REFUND = "refund"
    GIVE_BACK = "give_back"
    BUYER_CLOSE = "buyer_close"
    REVOKE = "revoke"
    PROVIDER_CLOSE = "provider_close"
    DISPUTE = "dispute"
    EVIDENCE = "evidence"
    WITHDRAW = "withdraw"
    RESOLVE = "resolve"
    UNDECIDED = "undecided"
    DEADLINE = "deadline"
    RETURN = "return"


_RETURN = frozenset({Event.RETURN})
_SESSION_OPEN = frozenset(
    {
        *(Event.TOP_UP, Event.TOKEN, Event.EXTEND, Event.RELEASE, Event.REDEEM),
        *(Event.BUYER_CLOSE, Event.REVOKE, Event.PROVIDER_CLOSE, Event.DEADLINE),
    }
)
# What goes on beside a delivery or a dispute: the rest of the money keeps working.
_MANUAL_ALWAYS = frozenset(
    {
        *(Event.TOP_UP, Event.EXTEND, Event.RELEASE, Event.SETTLE, Event.CONDITION),
        *(Event.DELIVER, Event.APPROVE, Event.REFUND, Event.GIVE_BACK, Event.DEADLINE),
    }
)
_REVIEW = frozenset({Event.REJECT, Event.REVIEW_END})
_DECISIONS = frozenset({Event.EVIDENCE, Event.WITHDRAW, Event.RESOLVE, Event.UNDECIDED})

TRANSITIONS = {
    (SESSION, Phase.OPEN): _SESSION_OPEN | _RETURN,
    (SESSION, Phase.CLOSING): _RETURN | {Event.REDEEM, Event.PROVIDER_CLOSE, Event.DEADLINE},
    (SESSION, Phase.ENDED): _RETURN,
    (MANUAL, Phase.OPEN): _MANUAL_ALWAYS
    | _RETURN
    | {Event.BUYER_CLOSE, Event.PROVIDER_CLOSE, Event.DISPUTE},
    (MANUAL, Phase.DELIVERED): _MANUAL_ALWAYS
    | _RETURN
    | _REVIEW
    | {Event.PROVIDER_CLOSE, Event.DISPUTE},
    (MANUAL, Phase.DISPUTED): _MANUAL_ALWAYS | _RETURN | _REVIEW | _DECISIONS | {Event.DISPUTE},
    (MANUAL, Phase.ENDED): _RETURN,
}
"""Everything an escrow can do, by (kind, phase)."""


class InvalidState(Exception):
    """The transition table has no such event in this state."""

    def __init__(self, status: str, event: Event) -> None:
        """`status` is what the escrow is in, `event` what was asked of it."""
        super().__init__(f"{event.value} is not possible while the escrow is {status}")
        self.status = status
        self.event = event


def check(escrow: Escrow, event: Event) -> None:
    """Raises `InvalidState` unless the table has this event for the escrow."""
    if event not in TRANSITIONS.get((escrow.kind, escrow.phase), ()):
        raise InvalidState(escrow.status, event)


class NotCovered(Exception):
    """An operation wants more than it may take; `available` is what it may, in atomic units."""

    def __init__(self, what: str, available: int) -> None:
        """`what` names the amount that is too small, for people."""
        super().__init__(f"only {available} units are {what}")
        self.what = what
        self.available = available

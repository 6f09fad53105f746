"""One step of a manual escrow: how every event ends, and what time does next.

`manual` and `dispute` say which events there are.
"""

from fractions import Fraction
from typing import Any

from x402mw.core.amounts import atomic
from x402mw.escrow.rules import table
from x402mw.escrow.rules.agreement import WHOLE, Agreement, Part, PartState
from x402mw.escrow.rules.money import raised
from x402mw.escrow.rules.table import Event, NotCovered
from x402mw.escrow.rules.values import ended_status

ANSWER_SECONDS = 24 * 60 * 60
"""How long who can still answer has at least, where the end would follow at once."""


def pay(
    agreement: Agreement, event: Event, paid: int, sent_home: int = 0, *, reason: str
) -> Agreement:
    """Moves free money to the provider and to the buyer; `reason` stays if that was all of it."""
    escrow = agreement.escrow
    table.check(escrow, event)
    if paid + sent_home > escrow.free:
        raise NotCovered("free", escrow.free)
    changes: dict[str, Any] = {
        **raised(escrow, escrow.released + paid),
        "refunded": atomic(escrow.refunded + sent_home),
    }
    if paid + sent_home == escrow.free:
        # Nothing is left that the fraction of a unit could be paid from.
        agreement = agreement._replace(carry=Fraction(0))
    if paid + sent_home == escrow.remaining:
        changes["close_reason"] = reason
    return happen(agreement, event, **changes)


def happen(before: Agreement, event: Event, **changes: Any) -> Agreement:
    """The agreement after an event that changes these fields of its escrow, or a refusal."""
    table.check(before.escrow, event)
    after = before._replace(escrow=before.escrow._replace(**changes))
    status, due_at = standing(after)
    return after._replace(escrow=after.escrow._replace(status=status, due_at=due_at))


def standing(agreement: Agreement) -> tuple[str, int | None]:
    """What all that an agreement consists of makes its status, and when time does something."""
    timer = next_timer(agreement)
    return _status(agreement), None if timer is None else timer[0]


def _status(agreement: Agreement) -> str:
    escrow = agreement.escrow
    if not escrow.remaining:
        return ended_status(escrow.amount, escrow.released)
    if agreement.dispute is not None:
        return "disputed"
    if any(part.state is PartState.DELIVERED for part in agreement.parts):
        return "delivered"
    return "partially_released" if escrow.released else "locked"


def with_part(agreement: Agreement, changed: Part) -> Agreement:
    """The same with one part changed."""
    parts = tuple(changed if part.number == changed.number else part for part in agreement.parts)
    return agreement._replace(parts=parts)


def with_reviews(agreement: Agreement, earliest: int) -> Agreement:
    """The same with no review that ends before a moment."""
    parts = tuple(
        part._replace(review_until=max(part.review_until, earliest)) if part.review_until else part
        for part in agreement.parts
    )
    return agreement._replace(parts=parts)


def next_timer(agreement: Agreement) -> tuple[int, Event, int] | None:
    """What time does next: (when, event, part); None if it does nothing any more.

    At one and the same second a review ends first, then a dispute, then the escrow.
    """
    escrow, opened = agreement.escrow, agreement.dispute
    if not escrow.remaining:
        return None
    timers = [
        (part.review_until or 0, 0, Event.REVIEW_END, part.number)
        for part in agreement.reviewed
        if not agreement.waits(part)
    ]
    if opened is not None:
        timers.append((opened.deadline, 1, Event.UNDECIDED, WHOLE))
    if expiring(agreement):
        timers.append((escrow.expires_at, 2, Event.DEADLINE, WHOLE))
    when, _, event, number = min(timers)
    return when, event, number


def expiring(agreement: Agreement) -> int:
    """What expiry would move: all that is free, but for deliveries whose review still runs."""
    return max(0, agreement.escrow.free - sum(map(agreement.worth, agreement.reviewed)))

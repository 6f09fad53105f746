"""Manual escrows: the buyer releases, by milestones if there are any, and may dispute a part.

    create ─> open <─> delivered ─> ...         every unit ends in R (paid) or F (refunded);
               └─ dispute ─> disputed ─> ...    nothing held = ended

Parts are the milestones; an escrow without any has one part, number 0, that is all of it. Amounts
finer than a unit are carried until whole units can move (M4).
"""

from enum import Enum
from fractions import Fraction
from typing import Any, NamedTuple

from x402mw.core.amounts import ZERO, Atomic, atomic
from x402mw.escrow.rules import table
from x402mw.escrow.rules.money import raised
from x402mw.escrow.rules.table import Event, InvalidState, NotCovered
from x402mw.escrow.rules.values import RELEASE, Escrow, ended_status

WHOLE = 0
"""The number of the one part of an escrow without milestones."""


class PartState(Enum):
    """How far a milestone is."""

    PENDING = "pending"
    DELIVERED = "delivered"
    REJECTED = "rejected"
    PAID = "paid"


class Part(NamedTuple):
    """A milestone. `amount` is what it is worth (of part 0: all that is free at the time).

    `review_until` is when a delivery that nobody answered is paid, None if never.
    """

    number: int
    name: str
    amount: Atomic
    state: PartState = PartState.PENDING
    proof: str = ""
    review_until: int | None = None


class Dispute(NamedTuple):
    """An open dispute over D of the escrow; `part` is the milestone it is about, if one."""

    number: int
    opener: str
    part: int | None
    opened_at: int
    deadline: int


class Agreement(NamedTuple):
    """A manual escrow with all that its two kinds of columns do not hold.

    `carry` (0 <= carry < 1) is what was released below a whole unit, in units.
    """

    escrow: Escrow
    parts: tuple[Part, ...]
    carry: Fraction = Fraction(0)
    review_seconds: int | None = None
    dispute: Dispute | None = None

    @property
    def under_review(self) -> int:
        """What is delivered and not yet answered; the buyer alone may not take it back."""
        delivered = [part for part in self.parts if part.state is PartState.DELIVERED]
        return min(self.escrow.free, sum(self.worth(part) for part in delivered))

    def worth(self, part: Part) -> int:
        """What a part is paid with: its amount, or all that is free."""
        return self.escrow.free if part.number == WHOLE else part.amount

    def find(self, number: int) -> Part:
        """The part with this number; raises `KeyError`."""
        return {part.number: part for part in self.parts}[number]


# The buyer's money in and out.


def top_up(agreement: Agreement, amount: Atomic) -> Agreement:
    """Locks more: L grows."""
    escrow = agreement.escrow
    return _happen(agreement, Event.TOP_UP, amount=atomic(escrow.amount + amount))


def extend(agreement: Agreement, expires_at: int) -> Agreement:
    """Ends it later; never earlier (T4)."""
    later = max(agreement.escrow.expires_at, expires_at)
    return _happen(agreement, Event.EXTEND, expires_at=later)


def release(agreement: Agreement, amount: Fraction) -> Agreement:
    """Pays whole units now and carries the rest: R + carry + x <= L - F - D, exactly."""
    table.check(agreement.escrow, Event.RELEASE)
    return _pay_exact(agreement, Event.RELEASE, amount)


def release_up_to(agreement: Agreement, cumulative: Fraction) -> Agreement:
    """Pays until so much was released in all; less than that changes nothing."""
    table.check(agreement.escrow, Event.RELEASE)
    missing = cumulative - agreement.escrow.released - agreement.carry
    return _pay_exact(agreement, Event.RELEASE, missing) if missing > 0 else agreement


def release_all(agreement: Agreement) -> Agreement:
    """Pays all that is free, and drops the carry."""
    table.check(agreement.escrow, Event.RELEASE)
    if not agreement.escrow.free:
        raise NotCovered("free", 0)
    return _pay(agreement, Event.RELEASE, agreement.escrow.free, reason="release")


def settle(agreement: Agreement, released: Atomic, refunded: Atomic) -> Agreement:
    """Pays one part and sends another home, at once: the performance settlement."""
    return _pay(agreement, Event.SETTLE, released, refunded, reason="release")


def meet_condition(agreement: Agreement) -> Agreement:
    """The outcome that was agreed on was presented: pays all that is free."""
    return _pay(agreement, Event.CONDITION, agreement.escrow.free, reason="release")


def refund(agreement: Agreement, amount: Atomic | None) -> Agreement:
    """The buyer takes back what is free and not under review; None means all of it."""
    table.check(agreement.escrow, Event.REFUND)
    most = agreement.escrow.free - agreement.under_review
    if most == 0 and agreement.under_review:
        raise InvalidState(agreement.escrow.status, Event.REFUND)
    return _send_home(agreement, Event.REFUND, most, amount)


def give_back(agreement: Agreement, amount: Atomic | None) -> Agreement:
    """The provider sends the buyer what is still held; None means all of it."""
    table.check(agreement.escrow, Event.GIVE_BACK)
    return _send_home(agreement, Event.GIVE_BACK, agreement.escrow.free, amount)


def close(agreement: Agreement, event: Event) -> Agreement:
    """Either party ends it: all that is held goes home."""
    return _pay(agreement, event, ZERO, agreement.escrow.free, reason=event.value)


def _send_home(agreement: Agreement, event: Event, most: int, amount: Atomic | None) -> Agreement:
    wanted = most if amount is None else amount
    if not 0 < wanted <= most:
        raise NotCovered("free to go back", most)
    return _pay(agreement, event, ZERO, wanted, reason="refund")


# Milestones and deliveries.


def deliver(agreement: Agreement, number: int, proof: str, now: int) -> Agreement:
    """The provider has delivered a part, with proof; the review window starts if there is one."""
    part = agreement.find(number)
    _check_part(agreement, part, Event.DELIVER, PartState.PENDING, PartState.REJECTED)
    seconds = agreement.review_seconds
    delivered = part._replace(
        state=PartState.DELIVERED,
        proof=proof,
        review_until=None if seconds is None else now + seconds,
    )
    return _happen(_with_part(agreement, delivered), Event.DELIVER)


def approve(agreement: Agreement, number: int) -> Agreement:
    """The buyer pays a part, delivered or not."""
    part = agreement.find(number)
    states = (PartState.PENDING, PartState.DELIVERED, PartState.REJECTED)
    _check_part(agreement, part, Event.APPROVE, *states)
    return _pay_part(agreement, part, Event.APPROVE, agreement.worth(part))


def reject(agreement: Agreement, number: int) -> Agreement:
    """The buyer does not take a delivery; the provider may deliver again."""
    part = agreement.find(number)
    _check_part(agreement, part, Event.REJECT, PartState.DELIVERED)
    rejected = part._replace(state=PartState.REJECTED, review_until=None)
    return _happen(_with_part(agreement, rejected), Event.REJECT)


def _check_part(agreement: Agreement, part: Part, event: Event, *states: PartState) -> None:
    table.check(agreement.escrow, event)
    held = agreement.dispute is not None and agreement.dispute.part == part.number
    if held or part.state not in states:
        raise InvalidState("disputed" if held else part.state.value, event)


def _pay_part(agreement: Agreement, part: Part, event: Event, amount: int) -> Agreement:
    paid = part._replace(state=PartState.PAID, review_until=None)
    return _pay(_with_part(agreement, paid), event, amount, reason="release")


def _with_part(agreement: Agreement, changed: Part) -> Agreement:
    parts = tuple(changed if part.number == changed.number else part for part in agreement.parts)
    return agreement._replace(parts=parts)


# Disputes.


def dispute(
    agreement: Agreement,
    opener: str,
    *,
    number: int,
    part: int | None,
    amount: Atomic | None,
    now: int,
    deadline: int,
) -> Agreement:
    """Either party holds back an amount until an arbiter decides; the rest keeps working."""
    escrow = agreement.escrow
    table.check(escrow, Event.DISPUTE)
    if part is None and agreement.parts[0].number == WHOLE and amount in (None, escrow.free):
        part = WHOLE
    if part is not None and agreement.find(part).state is PartState.PAID:
        raise InvalidState(PartState.PAID.value, Event.DISPUTE)
    if amount is None:
        wanted = escrow.free if part is None else agreement.worth(agreement.find(part))
        amount = Atomic(min(wanted, escrow.free))
    if not 0 < amount <= escrow.free:
        raise NotCovered("free", escrow.free)
    opened = Dispute(number, opener, part, now, deadline)
    return _happen(agreement._replace(dispute=opened), Event.DISPUTE, disputed=amount)


def check_evidence(agreement: Agreement) -> None:
    """Refuses evidence where nothing is disputed."""
    table.check(agreement.escrow, Event.EVIDENCE)


def withdraw(agreement: Agreement, now: int) -> Agreement:
    """The opener takes a dispute back; the clock of its part goes on where it stood."""
    table.check(agreement.escrow, Event.WITHDRAW)
    opened = _open_dispute(agreement)
    if opened.part is not None:
        part = agreement.find(opened.part)
        if part.review_until is not None:
            later = part.review_until + now - opened.opened_at
            agreement = _with_part(agreement, part._replace(review_until=later))
    return _happen(agreement._replace(dispute=None), Event.WITHDRAW, disputed=ZERO)


def resolve(agreement: Agreement, to_provider: Atomic, to_buyer: Atomic) -> Agreement:
    """An arbiter decides: both shares together are what is disputed."""
    table.check(agreement.escrow, Event.RESOLVE)
    if to_provider + to_buyer != agreement.escrow.disputed:
        raise NotCovered("disputed, to be shared in full", agreement.escrow.disputed)
    return _decide(agreement, Event.RESOLVE, to_provider, to_buyer, "dispute_resolved")


def _leave_undecided(agreement: Agreement) -> Agreement:
    """Nobody decided in time: what expiry would do is done with D."""
    held = agreement.escrow.disputed
    paid = held if agreement.escrow.on_expiry == RELEASE else ZERO
    return _decide(agreement, Event.UNDECIDED, paid, Atomic(held - paid), "undecided")


def _decide(
    agreement: Agreement, event: Event, paid: Atomic, sent_home: Atomic, reason: str
) -> Agreement:
    opened = _open_dispute(agreement)
    if opened.part is not None:
        part = agreement.find(opened.part)._replace(state=PartState.PAID, review_until=None)
        agreement = _with_part(agreement, part)
    escrow = agreement.escrow._replace(disputed=ZERO)
    free = agreement._replace(escrow=escrow, dispute=None)
    return _pay(free, event, paid, sent_home, reason=reason)


def _open_dispute(agreement: Agreement) -> Dispute:
    if agreement.dispute is None:
        raise InvalidState(agreement.escrow.status, Event.WITHDRAW)
    return agreement.dispute


# Time.


def next_timer(agreement: Agreement) -> tuple[int, Event, int] | None:
    """What time does next: (when, event, part); None if it does nothing any more.

    At one and the same second a review ends first, then a dispute, then the escrow.
    """
    escrow, opened = agreement.escrow, agreement.dispute
    if not escrow.remaining:
        return None
    timers = [
        (part.review_until or 0, 0, Event.REVIEW_END, part.number) for part in _timed(agreement)
    ]
    if opened is not None:
        timers.append((opened.deadline, 1, Event.UNDECIDED, WHOLE))
    if _expiring(agreement):
        timers.append((escrow.expires_at, 2, Event.DEADLINE, WHOLE))
    when, _, event, number = min(timers)
    return when, event, number


def _timed(agreement: Agreement) -> list[Part]:
    """The deliveries that are paid unless somebody answers in time."""
    held = None if agreement.dispute is None else agreement.dispute.part
    return [
        part
        for part in agreement.parts
        if part.state is PartState.DELIVERED
        and part.review_until is not None
        and part.number != held
    ]


def _expiring(agreement: Agreement) -> int:
    """What expiry would move: all that is free, but for deliveries whose review still runs."""
    return max(0, agreement.escrow.free - sum(map(agreement.worth, _timed(agreement))))


def pass_time(agreement: Agreement) -> tuple[Agreement, Event, int]:
    """Does what time does next; returns the event and the second at which it counts."""
    timer = next_timer(agreement)
    if timer is None:
        raise InvalidState(agreement.escrow.status, Event.DEADLINE)
    when, event, number = timer
    if event is Event.REVIEW_END:
        part = agreement.find(number)
        amount = min(agreement.worth(part), agreement.escrow.free)
        return _pay_part(agreement, part, event, amount), event, when
    if event is Event.UNDECIDED:
        return _leave_undecided(agreement), event, when
    return _expire(agreement), event, when


def _expire(agreement: Agreement) -> Agreement:
    amount = _expiring(agreement)
    if agreement.escrow.on_expiry == RELEASE:
        return _pay(agreement, Event.DEADLINE, amount, reason="expired_release")
    return _pay(agreement, Event.DEADLINE, ZERO, amount, reason="expired_refund")


# How every event ends.


def _pay_exact(agreement: Agreement, event: Event, amount: Fraction) -> Agreement:
    exact = agreement.carry + amount
    if exact > agreement.escrow.free:
        raise NotCovered("free", agreement.escrow.free)
    whole = exact.numerator // exact.denominator
    return _pay(agreement._replace(carry=exact - whole), event, whole, reason="release")


def _pay(
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
    return _happen(agreement, event, **changes)


def _happen(before: Agreement, event: Event, **changes: Any) -> Agreement:
    """The agreement after an event that changes these fields of its escrow, or a refusal."""
    table.check(before.escrow, event)
    after = before._replace(escrow=before.escrow._replace(**changes))
    timer = next_timer(after)
    due_at = None if timer is None else timer[0]
    escrow = after.escrow._replace(status=_status(after), due_at=due_at)
    return after._replace(escrow=escrow)


def _status(agreement: Agreement) -> str:
    escrow = agreement.escrow
    if not escrow.remaining:
        return ended_status(escrow.amount, escrow.released)
    if agreement.dispute is not None:
        return "disputed"
    if any(part.state is PartState.DELIVERED for part in agreement.parts):
        return "delivered"
    return "partially_released" if escrow.released else "locked"

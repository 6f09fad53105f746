"""Manual escrows: the buyer releases, by milestones if there are any.

    create ─> open <─> delivered ─> ...         every unit ends in R (paid) or F (refunded);
               └─ dispute ─> disputed ─> ...    nothing held = ended

Amounts finer than a unit are carried until whole units can move (M4). What parts are stands in
`agreement`, how an event ends in `step`, and the rest of the picture in `dispute`.
"""

from fractions import Fraction

from x402mw.core.amounts import ZERO, Atomic, atomic
from x402mw.escrow.rules import table
from x402mw.escrow.rules.agreement import WHOLE, Agreement, Part, PartState
from x402mw.escrow.rules.dispute import leave_undecided
from x402mw.escrow.rules.step import (
    ANSWER_SECONDS,
    expiring,
    happen,
    next_timer,
    pay,
    with_part,
)
from x402mw.escrow.rules.table import Event, InvalidState, NotCovered
from x402mw.escrow.rules.values import RELEASE

# The buyer's money in and out.


def top_up(agreement: Agreement, amount: Atomic) -> Agreement:
    """Locks more: L grows."""
    escrow = agreement.escrow
    return happen(agreement, Event.TOP_UP, amount=atomic(escrow.amount + amount))


def extend(agreement: Agreement, expires_at: int) -> Agreement:
    """Ends it later; never earlier (T4), and not once a delivery waits to be paid by the end."""
    if agreement.escrow.on_expiry == RELEASE and agreement.done:
        raise InvalidState("delivered", Event.EXTEND)
    later = max(agreement.escrow.expires_at, expires_at)
    return happen(agreement, Event.EXTEND, expires_at=later)


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
    return _pay_all(agreement, Event.RELEASE)


def settle(agreement: Agreement, released: Atomic, refunded: Atomic) -> Agreement:
    """Pays one part and sends another home, at once: the performance settlement."""
    most = _takeable(agreement, Event.SETTLE) if refunded else ZERO
    if refunded > most:
        raise NotCovered("free to go back", most)
    return pay(agreement, Event.SETTLE, released, refunded, reason="release")


def meet_condition(agreement: Agreement) -> Agreement:
    """The outcome that was agreed on was presented: pays all that is free."""
    return _pay_all(agreement, Event.CONDITION)


def refund(agreement: Agreement, amount: Atomic | None) -> Agreement:
    """The buyer takes back what is free and never was delivered; None means all of it."""
    return _send_home(agreement, Event.REFUND, _takeable(agreement, Event.REFUND), amount)


def give_back(agreement: Agreement, amount: Atomic | None) -> Agreement:
    """The provider sends the buyer what is still held; None means all of it."""
    return _send_home(agreement, Event.GIVE_BACK, agreement.escrow.free, amount)


def _takeable(agreement: Agreement, event: Event) -> Atomic:
    """What a buyer may take alone: what was delivered needs the provider or a dispute."""
    table.check(agreement.escrow, event)
    most = agreement.escrow.free - agreement.claimed
    if not most and agreement.claimed:
        raise InvalidState("delivered", event)
    return atomic(most)


def _send_home(
    agreement: Agreement, event: Event, most: Atomic, amount: Atomic | None
) -> Agreement:
    table.check(agreement.escrow, event)
    wanted = most if amount is None else amount
    if not 0 < wanted <= most:
        raise NotCovered("free to go back", most)
    return pay(agreement, event, ZERO, wanted, reason="refund")


def close(agreement: Agreement, event: Event) -> Agreement:
    """Either party ends it: all that is held goes home, if the buyer may take all of it."""
    table.check(agreement.escrow, event)
    if event is Event.BUYER_CLOSE and agreement.claimed:
        raise InvalidState("delivered", event)
    return pay(agreement, event, ZERO, agreement.escrow.free, reason=event.value)


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
    return happen(with_part(agreement, delivered), Event.DELIVER)


def approve(agreement: Agreement, number: int) -> Agreement:
    """The buyer pays a part, delivered or not."""
    part = agreement.find(number)
    states = (PartState.PENDING, PartState.DELIVERED, PartState.REJECTED)
    _check_part(agreement, part, Event.APPROVE, *states)
    amount = agreement.worth(part)
    if not amount:
        raise NotCovered("free", 0)
    return _pay_part(agreement, part, Event.APPROVE, amount)


def reject(agreement: Agreement, number: int, now: int) -> Agreement:
    """The buyer does not take a delivery; the provider may deliver again.

    The end is a day away at least: an answer that the end follows at once could not be answered.
    """
    part = agreement.find(number)
    _check_part(agreement, part, Event.REJECT, PartState.DELIVERED)
    rejected = part._replace(state=PartState.REJECTED, review_until=None)
    later = max(agreement.escrow.expires_at, now + ANSWER_SECONDS)
    return happen(with_part(agreement, rejected), Event.REJECT, expires_at=later)


def _check_part(agreement: Agreement, part: Part, event: Event, *states: PartState) -> None:
    table.check(agreement.escrow, event)
    held = agreement.holds(part)
    if held or part.state not in states:
        raise InvalidState("disputed" if held else part.state.value, event)


def _pay_part(agreement: Agreement, part: Part, event: Event, amount: int) -> Agreement:
    # What a dispute holds of an escrow without milestones is still to be delivered and paid.
    if part.number != WHOLE or amount == agreement.escrow.remaining:
        part = part._replace(state=PartState.PAID, review_until=None)
    return pay(with_part(agreement, part), event, amount, reason="release")


# Time.


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
        return leave_undecided(agreement, when), event, when
    return _expire(agreement), event, when


def _expire(agreement: Agreement) -> Agreement:
    amount = expiring(agreement)
    if agreement.escrow.on_expiry == RELEASE:
        return pay(agreement, Event.DEADLINE, amount, reason="expired_release")
    return pay(agreement, Event.DEADLINE, ZERO, amount, reason="expired_refund")


# Whole units and what is carried.


def _pay_exact(agreement: Agreement, event: Event, amount: Fraction) -> Agreement:
    exact = agreement.carry + amount
    if exact > agreement.escrow.free:
        raise NotCovered("free", agreement.escrow.free)
    whole = exact.numerator // exact.denominator
    return pay(agreement._replace(carry=exact - whole), event, whole, reason="release")


def _pay_all(agreement: Agreement, event: Event) -> Agreement:
    table.check(agreement.escrow, event)
    if not agreement.escrow.free:
        raise NotCovered("free", 0)
    return pay(agreement, event, agreement.escrow.free, reason="release")

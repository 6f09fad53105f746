"""Manual escrows: the buyer releases, by milestones if there are any, and may dispute a part.

    create ─> open <─> delivered ─> ...         every unit ends in R (paid) or F (refunded);
               └─ dispute ─> disputed ─> ...    nothing held = ended

Amounts finer than a unit are carried until whole units can move (M4). What parts and disputes are
stands in `agreement`.
"""

from fractions import Fraction
from typing import Any

from x402mw.core.amounts import ZERO, Atomic, atomic
from x402mw.escrow.rules import table
from x402mw.escrow.rules.agreement import WHOLE, Agreement, Dispute, Part, PartState
from x402mw.escrow.rules.money import raised
from x402mw.escrow.rules.table import Event, InvalidState, NotCovered
from x402mw.escrow.rules.values import RELEASE, ended_status

# The buyer's money in and out.


def top_up(agreement: Agreement, amount: Atomic) -> Agreement:
    """Locks more: L grows."""
    escrow = agreement.escrow
    return _happen(agreement, Event.TOP_UP, amount=atomic(escrow.amount + amount))


def extend(agreement: Agreement, expires_at: int) -> Agreement:
    """Ends it later; never earlier (T4), and not once a delivery waits to be paid by the end."""
    if agreement.escrow.on_expiry == RELEASE and agreement.claimed:
        raise InvalidState("delivered", Event.EXTEND)
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
    return _pay_all(agreement, Event.RELEASE)


def settle(agreement: Agreement, released: Atomic, refunded: Atomic) -> Agreement:
    """Pays one part and sends another home, at once: the performance settlement."""
    most = _takeable(agreement, Event.SETTLE) if refunded else ZERO
    if refunded > most:
        raise NotCovered("free to go back", most)
    return _pay(agreement, Event.SETTLE, released, refunded, reason="release")


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
    return _pay(agreement, event, ZERO, wanted, reason="refund")


def close(agreement: Agreement, event: Event) -> Agreement:
    """Either party ends it: all that is held goes home, if the buyer may take all of it."""
    table.check(agreement.escrow, event)
    if event is Event.BUYER_CLOSE and agreement.claimed:
        raise InvalidState("delivered", event)
    return _pay(agreement, event, ZERO, agreement.escrow.free, reason=event.value)


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
    amount = agreement.worth(part)
    if not amount:
        raise NotCovered("free", 0)
    return _pay_part(agreement, part, Event.APPROVE, amount)


def reject(agreement: Agreement, number: int) -> Agreement:
    """The buyer does not take a delivery; the provider may deliver again."""
    part = agreement.find(number)
    _check_part(agreement, part, Event.REJECT, PartState.DELIVERED)
    rejected = part._replace(state=PartState.REJECTED, review_until=None)
    return _happen(_with_part(agreement, rejected), Event.REJECT)


def _check_part(agreement: Agreement, part: Part, event: Event, *states: PartState) -> None:
    table.check(agreement.escrow, event)
    held = agreement.holds(part)
    if held or part.state not in states:
        raise InvalidState("disputed" if held else part.state.value, event)


def _pay_part(agreement: Agreement, part: Part, event: Event, amount: int) -> Agreement:
    # What a dispute holds of an escrow without milestones is still to be delivered and paid.
    if part.number != WHOLE or amount == agreement.escrow.remaining:
        part = part._replace(state=PartState.PAID, review_until=None)
    return _pay(_with_part(agreement, part), event, amount, reason="release")


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
    """Either party holds back an amount until an arbiter decides; the rest keeps working.

    A milestone is held as a whole: what a dispute left of it would belong to no part any more.
    """
    escrow = agreement.escrow
    table.check(escrow, Event.DISPUTE)
    if part is None and agreement.parts[0].number == WHOLE and amount in (None, escrow.free):
        part = WHOLE
    held = escrow.free if amount is None else amount
    if part is not None:
        held = _all_of_part(agreement, agreement.find(part), amount)
    if not 0 < held <= escrow.free:
        raise NotCovered("free", escrow.free)
    opened = Dispute(number, opener, part, now, deadline)
    return _happen(agreement._replace(dispute=opened), Event.DISPUTE, disputed=held)


def _all_of_part(agreement: Agreement, part: Part, amount: Atomic | None) -> Atomic:
    if part.state is PartState.PAID:
        raise InvalidState(part.state.value, Event.DISPUTE)
    whole = atomic(min(agreement.worth(part), agreement.escrow.free))
    if amount not in (None, whole):
        raise NotCovered("in this milestone, which is disputed as a whole", whole)
    return whole


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
    return _happen(_end_dispute(agreement, now), Event.WITHDRAW)


def resolve(agreement: Agreement, to_provider: Atomic, to_buyer: Atomic, now: int) -> Agreement:
    """An arbiter decides: both shares together are what is disputed."""
    table.check(agreement.escrow, Event.RESOLVE)
    if to_provider + to_buyer != agreement.escrow.disputed:
        raise NotCovered("disputed, to be shared in full", agreement.escrow.disputed)
    return _decide(agreement, Event.RESOLVE, (to_provider, to_buyer), "dispute_resolved", now)


def _leave_undecided(agreement: Agreement, now: int) -> Agreement:
    """Nobody decided in time: what expiry would do is done with D."""
    held = agreement.escrow.disputed
    shares = (held, ZERO) if agreement.escrow.on_expiry == RELEASE else (ZERO, held)
    return _decide(agreement, Event.UNDECIDED, shares, "undecided", now)


def _decide(
    agreement: Agreement, event: Event, shares: tuple[Atomic, Atomic], reason: str, now: int
) -> Agreement:
    opened = _open_dispute(agreement)
    if opened.part is not None:
        # What came in since a dispute over everything is still to be delivered and paid.
        more = opened.part == WHOLE and agreement.escrow.free
        state = PartState.PENDING if more else PartState.PAID
        part = agreement.find(opened.part)._replace(state=state, review_until=None)
        agreement = _with_part(agreement, part)
    return _pay(_end_dispute(agreement, now), event, *shares, reason=reason)


def _end_dispute(agreement: Agreement, now: int) -> Agreement:
    """Nothing is disputed any more; reviews that waited for it end now."""
    parts = tuple(
        part._replace(review_until=max(part.review_until, now)) if part.review_until else part
        for part in agreement.parts
    )
    free = agreement.escrow._replace(disputed=ZERO)
    return agreement._replace(escrow=free, parts=parts, dispute=None)


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
        (part.review_until or 0, 0, Event.REVIEW_END, part.number)
        for part in agreement.reviewed
        if not agreement.waits(part)
    ]
    if opened is not None:
        timers.append((opened.deadline, 1, Event.UNDECIDED, WHOLE))
    if _expiring(agreement):
        timers.append((escrow.expires_at, 2, Event.DEADLINE, WHOLE))
    when, _, event, number = min(timers)
    return when, event, number


def _expiring(agreement: Agreement) -> int:
    """What expiry would move: all that is free, but for deliveries whose review still runs."""
    return max(0, agreement.escrow.free - sum(map(agreement.worth, agreement.reviewed)))


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
        return _leave_undecided(agreement, when), event, when
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


def _pay_all(agreement: Agreement, event: Event) -> Agreement:
    table.check(agreement.escrow, event)
    if not agreement.escrow.free:
        raise NotCovered("free", 0)
    return _pay(agreement, event, agreement.escrow.free, reason="release")


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

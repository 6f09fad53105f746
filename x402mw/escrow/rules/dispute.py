"""Disputes of manual escrows: held money that an arbiter shares out, or time.

`docs/disputes.md` is the playbook.
"""

from x402mw.core.amounts import ZERO, Atomic, atomic
from x402mw.escrow.rules import table
from x402mw.escrow.rules.agreement import WHOLE, Agreement, Dispute, Part, PartState
from x402mw.escrow.rules.step import ANSWER_SECONDS, happen, pay, with_part, with_reviews
from x402mw.escrow.rules.table import Event, InvalidState, NotCovered
from x402mw.escrow.rules.values import RELEASE


def open_dispute(
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
    While one is open the other party may raise it to all there is: else a dispute over next to
    nothing would keep it from opening its own.
    """
    table.check(agreement.escrow, Event.DISPUTE)
    raised = agreement.dispute is not None
    if raised:
        agreement = _make_way(agreement, opener, now)
    escrow = agreement.escrow
    if part is None and agreement.parts[0].number == WHOLE and amount in (None, escrow.free):
        part = WHOLE
    held = escrow.free if amount is None else amount
    if part is not None:
        held = _all_of_part(agreement, agreement.find(part), amount)
    if not 0 < held <= escrow.free:
        raise NotCovered("free", escrow.free)
    if raised and held != escrow.free:
        raise InvalidState("disputed", Event.DISPUTE)
    opened = Dispute(number, opener, part, now, deadline, raised)
    return happen(agreement._replace(dispute=opened), Event.DISPUTE, disputed=held)


def _make_way(agreement: Agreement, opener: str, now: int) -> Agreement:
    """Takes the open dispute away for the other party's over everything."""
    if opener == _open_dispute(agreement).opener or not agreement.escrow.free:
        raise InvalidState("disputed", Event.DISPUTE)
    return _take_back(agreement, now)


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
    """The opener takes a dispute back; one that was raised is not the opener's alone."""
    table.check(agreement.escrow, Event.WITHDRAW)
    if _open_dispute(agreement).raised:
        raise InvalidState("disputed", Event.WITHDRAW)
    return happen(_take_back(agreement, now), Event.WITHDRAW)


def _take_back(agreement: Agreement, now: int) -> Agreement:
    """Nothing is disputed any more; the clock of the part that was held goes on where it stood."""
    opened = _open_dispute(agreement)
    if opened.part is not None:
        part = agreement.find(opened.part)
        if part.review_until is not None:
            later = part.review_until + now - opened.opened_at
            agreement = with_part(agreement, part._replace(review_until=later))
    return _end_dispute(agreement, now)


def resolve(agreement: Agreement, to_provider: Atomic, to_buyer: Atomic, now: int) -> Agreement:
    """An arbiter decides: both shares together are what is disputed."""
    table.check(agreement.escrow, Event.RESOLVE)
    if to_provider + to_buyer != agreement.escrow.disputed:
        raise NotCovered("disputed, to be shared in full", agreement.escrow.disputed)
    return _decide(agreement, Event.RESOLVE, (to_provider, to_buyer), "dispute_resolved", now)


def leave_undecided(agreement: Agreement, now: int) -> Agreement:
    """Nobody decided in time: what expiry would do is done with D, if that is not too early.

    Whom expiry favours must not bring it forward by a dispute that nobody looks at: before the end
    theirs, and one that both wanted, is as if withdrawn, with a day to answer deliveries.
    """
    opened, escrow = _open_dispute(agreement), agreement.escrow
    to_provider = escrow.on_expiry == RELEASE
    favoured = escrow.provider if to_provider else escrow.buyer
    if now < escrow.expires_at and (opened.raised or opened.opener == favoured):
        free = with_reviews(_take_back(agreement, now), now + ANSWER_SECONDS)
        return happen(free, Event.UNDECIDED)
    shares = (escrow.disputed, ZERO) if to_provider else (ZERO, escrow.disputed)
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
        agreement = with_part(agreement, part)
    return pay(_end_dispute(agreement, now), event, *shares, reason=reason)


def _end_dispute(agreement: Agreement, now: int) -> Agreement:
    """Nothing is disputed any more; reviews that waited for it end now."""
    free = agreement.escrow._replace(disputed=ZERO)
    return with_reviews(agreement._replace(escrow=free, dispute=None), now)


def _open_dispute(agreement: Agreement) -> Dispute:
    if agreement.dispute is None:
        raise InvalidState(agreement.escrow.status, Event.WITHDRAW)
    return agreement.dispute

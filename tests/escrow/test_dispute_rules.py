"""What a dispute may not be used for: to silence the other party, or to move the end."""

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.escrow.agreement_steps import (
    BUYER,
    DAY,
    PROVIDER,
    REVIEW,
    T0,
    check,
    dispute,
    lock,
    pass_until,
)
from x402mw.core.amounts import Atomic
from x402mw.escrow.rules import dispute as disputes
from x402mw.escrow.rules import manual
from x402mw.escrow.rules.agreement import WHOLE, Agreement, PartState
from x402mw.escrow.rules.step import ANSWER_SECONDS
from x402mw.escrow.rules.table import Event, InvalidState, NotCovered
from x402mw.escrow.rules.values import REFUND, RELEASE

WEEK = 7 * DAY
SECOND = T0 + 1


@pytest.mark.parametrize("milestones", [(), (4, 6)])
def test_the_other_party_may_raise_a_dispute_to_everything(milestones: tuple[int, ...]) -> None:
    """Rule 5: a dispute over a unit keeps nobody from disputing; once it is about all, it stays."""
    held = dispute(lock(10, *milestones), 1, by=PROVIDER)
    with pytest.raises(InvalidState, match="disputed"):
        dispute(held, by=PROVIDER)
    with pytest.raises(InvalidState, match="disputed"):
        dispute(held, 9)
    raised = dispute(held, now=SECOND)
    check(raised)
    assert raised.dispute is not None
    assert (raised.escrow.disputed, raised.dispute.opener, raised.dispute.raised) == (
        10,
        BUYER,
        True,
    )
    for again in (BUYER, PROVIDER):
        with pytest.raises(InvalidState, match="disputed"):
            dispute(raised, by=again)
    with pytest.raises(InvalidState, match="disputed"):
        disputes.withdraw(raised, SECOND)
    decided = disputes.resolve(raised, Atomic(3), Atomic(7), SECOND)
    assert decided.escrow.status == "settled"


def test_what_came_in_since_may_be_disputed_too() -> None:
    """Rule 5: a dispute over all there was is raised to all there is."""
    more = manual.top_up(dispute(lock(10)), Atomic(5))
    assert dispute(more, by=PROVIDER).escrow.disputed == 15


def test_a_raised_dispute_pays_no_delivery_behind_it() -> None:
    """Rule 5: the milestone that the first was about is not paid while all is disputed."""
    held = dispute(manual.deliver(lock(10, 4, 6), 1, "", T0), part=1, now=SECOND)
    raised = dispute(held, by=PROVIDER, now=SECOND + 1)
    later = pass_until(raised, SECOND + WEEK)
    assert (later.escrow.released, later.parts[0].state) == (0, PartState.DELIVERED)


def long(on_expiry: str) -> Agreement:
    """A delivered escrow that ends a month from now, when the first review is over soon."""
    opened = manual.extend(lock(10, on_expiry=on_expiry), T0 + 30 * DAY)
    return manual.deliver(opened, WHOLE, "", T0)


@pytest.mark.parametrize(
    ("on_expiry", "by", "paid", "refunded"),
    [
        (RELEASE, PROVIDER, 0, 0),
        (RELEASE, BUYER, 10, 0),
        (REFUND, BUYER, 0, 0),
        (REFUND, PROVIDER, 0, 10),
    ],
)
def test_nobody_gains_by_a_dispute_of_their_own_that_nobody_decides(
    on_expiry: str, by: str, paid: int, refunded: int
) -> None:
    """E11: before the end it is as if withdrawn, with a day to answer; it never pays its opener."""
    after, event, when = manual.pass_time(dispute(long(on_expiry), by=by))
    assert (event, when) == (Event.UNDECIDED, T0 + WEEK)
    assert (after.escrow.released, after.escrow.refunded) == (paid, refunded)
    if not paid + refunded:
        assert after.escrow.status == "delivered"
        assert after.escrow.due_at == when + ANSWER_SECONDS
    check(after)


def test_what_both_dispute_goes_on_if_nobody_decides() -> None:
    """Rule 5: neither has asked for what the end would do, so it does not come early."""
    raised = dispute(dispute(long(RELEASE), 1, by=PROVIDER), now=SECOND)
    after, event, when = manual.pass_time(raised)
    assert (event, after.escrow.disputed, after.escrow.free) == (Event.UNDECIDED, 0, 10)
    assert after.escrow.due_at == when + ANSWER_SECONDS


@pytest.mark.parametrize(("on_expiry", "status"), [(RELEASE, "released"), (REFUND, "refunded")])
def test_after_the_end_an_undecided_dispute_does_what_the_end_does(
    on_expiry: str, status: str
) -> None:
    """Rule 5: whoever opened it, on_expiry is done with D once the end has passed."""
    for by in (BUYER, PROVIDER):
        held = dispute(lock(10, on_expiry=on_expiry), by=by)
        assert pass_until(held, T0 + WEEK).escrow.status == status


@pytest.mark.parametrize("on_expiry", [RELEASE, REFUND])
@pytest.mark.parametrize("rejected_at", [T0 + DAY - 1, T0 + DAY + REVIEW - 2])
def test_a_rejection_leaves_a_day_to_answer(on_expiry: str, rejected_at: int) -> None:
    """X24: the end that would follow at once is a day away, so that either may still dispute."""
    late = manual.deliver(lock(10, on_expiry=on_expiry), WHOLE, "", T0 + DAY - 1)
    waiting = pass_until(late, rejected_at)
    rejected = manual.reject(waiting, WHOLE, rejected_at)
    assert rejected.escrow.due_at == rejected.escrow.expires_at == rejected_at + ANSWER_SECONDS
    assert pass_until(rejected, rejected_at + ANSWER_SECONDS - 1) == rejected
    for by in (BUYER, PROVIDER):
        assert dispute(rejected, by=by).escrow.disputed == 10
    early = manual.reject(manual.deliver(lock(10), WHOLE, "", T0), WHOLE, T0)
    assert early.escrow.expires_at == T0 + DAY


@pytest.mark.parametrize("by", [BUYER, PROVIDER])
@pytest.mark.parametrize("milestones", [(), (4, 6)])
def test_a_dispute_does_not_let_the_end_be_put_off(by: str, milestones: tuple[int, ...]) -> None:
    """T3: what is delivered and disputed keeps its end as what is delivered does."""
    opened = lock(10, *milestones, on_expiry=RELEASE)
    delivered = manual.deliver(opened, opened.parts[0].number, "", T0)
    for held in (dispute(delivered, by=by), dispute(delivered, part=delivered.parts[0].number)):
        with pytest.raises(InvalidState, match="delivered"):
            manual.extend(held, T0 + 100 * DAY)


ACTS: list[Any] = [
    lambda a, x, now: manual.refund(a, Atomic(x) if x else None),
    lambda a, x, now: manual.settle(a, Atomic(x // 2), Atomic(x - x // 2)),
    lambda a, _, now: manual.close(a, Event.BUYER_CLOSE),
    lambda a, _, now: manual.reject(a, 1, now),
    lambda a, x, now: manual.extend(a, a.escrow.expires_at + x),
    lambda a, x, now: dispute(a, x or None, part=x % 3 or None, now=now),
    lambda a, _, now: disputes.withdraw(a, now),
]


@given(
    st.sampled_from([RELEASE, REFUND]),
    st.lists(
        st.tuples(st.sampled_from(ACTS), st.integers(0, 12), st.sampled_from([1, REVIEW - 1, DAY])),
        max_size=8,
    ),
)
def test_a_provider_can_always_have_judged_what_a_buyer_did(
    on_expiry: str, acts: list[Any]
) -> None:
    """X24: no act takes a delivery back by itself, nor keeps the provider from a dispute."""
    agreement, now = manual.deliver(lock(10, 4, 6, on_expiry=on_expiry), 1, "", T0), T0
    for act, amount, wait in acts:
        now += wait
        agreement = pass_until(agreement, now)
        before = theirs(agreement)
        with suppress(InvalidState, NotCovered):
            agreement = pass_until(act(agreement, amount, now), now)
        check(agreement)
        assert theirs(agreement) >= min(4, before)
        if agreement.escrow.free:
            assert dispute(agreement, by=PROVIDER, now=now).escrow.free == 0


def theirs(agreement: Agreement) -> int:
    """What a provider has, or may still get."""
    return agreement.escrow.released + agreement.escrow.remaining

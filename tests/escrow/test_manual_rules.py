"""The pure rules of manual escrows: `docs/money.md` M4 and 3 to 6."""

import math
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.escrow.agreement_steps import (
    BUYER,
    DAY,
    DOLLAR,
    PROVIDER,
    REFERRER,
    REVIEW,
    STEPS,
    T0,
    TIMED,
    Step,
    check,
    dispute,
    lock,
    moved,
    pass_until,
)
from tests.escrow.test_rules import session
from x402mw.core.amounts import Atomic, to_atomic
from x402mw.escrow import modes
from x402mw.escrow.rules import dispute as disputes
from x402mw.escrow.rules import manual, money, table
from x402mw.escrow.rules import session as sessions
from x402mw.escrow.rules.agreement import WHOLE, Agreement, PartState
from x402mw.escrow.rules.step import next_timer
from x402mw.escrow.rules.table import TRANSITIONS, Event, InvalidState, NotCovered
from x402mw.escrow.rules.values import MANUAL, RELEASE, SESSION, Escrow, Phase

HALF = Fraction(1, 2)
fractions = st.builds(Fraction, st.integers(0, 5_000), st.sampled_from([1, 2, 3, 10, 10**6]))


def phases() -> dict[Phase, Agreement]:
    """A manual escrow with two milestones in each phase; the first part is in question."""
    opened = lock(10 * DOLLAR, 4 * DOLLAR, 4 * DOLLAR)
    delivered = manual.deliver(opened, 1, "proof", T0)
    return {
        Phase.OPEN: opened,
        Phase.DELIVERED: delivered,
        Phase.DISPUTED: dispute(delivered, 1),
        Phase.ENDED: manual.close(opened, Event.BUYER_CLOSE),
    }


# The table.


@pytest.mark.parametrize(
    ("phase", "event"), list(product((p for p in Phase if p is not Phase.CLOSING), STEPS))
)
def test_every_pair_of_phase_and_event_is_as_the_table_says(phase: Phase, event: Event) -> None:
    """Rule 5: each event that is in the table works, and each other one names the state."""
    agreement = phases()[phase]
    if event in TRANSITIONS[MANUAL, phase]:
        check(STEPS[event](agreement))
        return
    with pytest.raises(InvalidState) as refused:
        STEPS[event](agreement)
    assert refused.value.status == agreement.escrow.status
    assert agreement.escrow.status in str(refused.value)


@pytest.mark.parametrize(("kind", "phase", "event"), list(product((MANUAL, SESSION), Phase, Event)))
def test_what_the_table_has_not_is_refused(kind: str, phase: Phase, event: Event) -> None:
    """Rule 5: one table for both kinds, asked by every event, also by those of time."""
    escrow = _escrow_in(kind, phase)
    if escrow is None:
        assert (kind, phase) not in TRANSITIONS
        return
    if event in TRANSITIONS[kind, phase]:
        table.check(escrow, event)
        return
    with pytest.raises(InvalidState) as refused:
        table.check(escrow, event)
    assert (refused.value.status, refused.value.event) == (escrow.status, event)


def _escrow_in(kind: str, phase: Phase) -> Escrow | None:
    if kind == MANUAL:
        found = phases().get(phase)
        return None if found is None else found.escrow
    closing = sessions.close_by_buyer(session(), T0)
    ended = sessions.reach_deadline(closing)
    return {Phase.OPEN: session(), Phase.CLOSING: closing, Phase.ENDED: ended}.get(phase)


def test_the_steps_cover_the_table() -> None:
    """Rule 5: no event of manual escrows is left out of these tests."""
    known = {e for (kind, _), events in TRANSITIONS.items() if kind == MANUAL for e in events}
    assert known == STEPS.keys() | TIMED


def test_nothing_happens_by_time_after_the_end() -> None:
    """I9: an ended escrow has no timer, and asking for one names the state."""
    ended = phases()[Phase.ENDED]
    assert next_timer(ended) is None
    with pytest.raises(InvalidState, match="refunded"):
        manual.pass_time(ended)


# Amounts finer than a unit.


@given(st.lists(fractions, max_size=30))
def test_exact_releases_pay_the_floor_of_their_total(amounts: list[Fraction]) -> None:
    """M4, I16: any sequence of exact releases pays floor(exact total), never more, never lost."""
    agreement, total = lock(), Fraction(0)
    for amount in amounts:
        agreement = manual.release(agreement, amount)
        total += amount
        assert agreement.escrow.released == math.floor(total)
        assert agreement.escrow.released + agreement.carry == total
        check(agreement)


@given(fractions, fractions)
def test_a_total_counts_what_is_carried(first: Fraction, total: Fraction) -> None:
    """M4: releasing up to a total pays the difference, fractions included; less changes nothing."""
    before = manual.release(lock(), first)
    after = manual.release_up_to(before, total)
    assert after.escrow.released + after.carry == max(first, total)
    assert manual.release_up_to(after, total) == after


def test_the_guard_on_a_release_is_exact() -> None:
    """Rule 4: R + carry + x <= L - F - D: half a unit too much is too much."""
    carrying = manual.release(lock(10), HALF)
    with pytest.raises(NotCovered):
        manual.release(carrying, Fraction(10))
    last = manual.release(carrying, Fraction(10) - HALF)
    assert last.escrow.status == "released"
    assert not last.carry


def test_everything_at_once_drops_the_carry() -> None:
    """M4: a full release or refund leaves nothing that a fraction could be paid from."""
    carrying = manual.release(lock(10), HALF)
    for after in (
        manual.release_all(carrying),
        manual.refund(carrying, None),
        manual.settle(carrying, Atomic(3), Atomic(7)),
        manual.close(carrying, Event.PROVIDER_CLOSE),
        pass_until(carrying, T0 + DAY),
    ):
        assert not after.carry
        assert not after.escrow.remaining
        check(after)


def test_a_carry_survives_while_everything_is_disputed() -> None:
    """M4: the fraction is kept beside a dispute; with nothing free, nothing is dropped."""
    held = dispute(manual.release(lock(10), HALF))
    for step in (STEPS[Event.CONDITION], manual.release_all, lambda a: manual.approve(a, WHOLE)):
        with pytest.raises((NotCovered, InvalidState)):
            step(held)
    again = disputes.withdraw(held, T0 + 1)
    assert manual.release(again, HALF).escrow.released == 1


# Fee, referral, payees.


@pytest.mark.parametrize("parts", [1, 7, 1000, 10_000])
def test_a_thousand_dollars_split_the_same_in_any_parts(parts: int) -> None:
    """Rule 3, I16: $990 + $8.50 + $1.50 with a referrer, however the release is split."""
    total = 1000 * DOLLAR
    states = [lock(total)]
    for _ in range(parts):
        states.append(manual.release(states[-1], Fraction(total, parts)))
    paid = moved(*states)
    assert (paid[agent(PROVIDER)], paid[modes.house("USDC")], paid[agent(REFERRER)]) == (
        990 * DOLLAR,
        to_atomic("8.50"),
        to_atomic("1.50"),
    )


def agent(name: str) -> str:
    """The account of an agent."""
    return f"agent:{name}"


weights = st.lists(st.integers(1, 1000), min_size=1, max_size=20)


@given(st.integers(0, 10**12), weights)
def test_shares_are_whole_and_fair(total: int, parts: list[int]) -> None:
    """E23: shares sum to the total, each off by at most about half a unit for each payee."""
    shared = [Fraction(part, sum(parts)) for part in parts]
    shares = money.share_out(total, shared)
    assert sum(shares) == total
    off = [abs(share - total * part) for share, part in zip(shares, shared, strict=True)]
    assert max(off) <= (len(parts) + 1) / 2
    assert all(
        a >= b
        for a, x in zip(shares, parts, strict=True)
        for b, y in zip(shares, parts, strict=True)
        if x > y
    )


@given(st.integers(0, 300), st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_each_unit_goes_to_who_is_furthest_behind(total: int, parts: list[int]) -> None:
    """E23, I16: the shares are those of handing out unit by unit, so no share ever falls."""
    shared = [Fraction(part, sum(parts)) for part in parts]
    held = [0] * len(parts)
    for given_out in range(total):
        assert money.share_out(given_out, shared) == held
        claims = [part / (2 * had + 1) for part, had in zip(shared, held, strict=True)]
        held[claims.index(max(claims))] += 1


@given(st.lists(st.integers(1, DOLLAR), min_size=1, max_size=8))
def test_payees_earn_the_same_however_a_release_is_split(amounts: list[int]) -> None:
    """E23, I16: each payee's sum follows from the total, not from its parts."""
    payees = money.write_payees([(PROVIDER, "0.334"), ("ag_x", "0.333"), ("ag_y", "0.333")])
    states = [lock(10 * DOLLAR, payees=payees)]
    for amount in amounts:
        states.append(manual.release(states[-1], Fraction(amount)))
    at_once = manual.release(states[0], Fraction(sum(amounts)))
    assert moved(*states) == moved(states[0], at_once)


@given(st.lists(st.integers(1, 3 * DOLLAR), min_size=1, max_size=3))
def test_payees_together_earn_what_the_provider_would(amounts: list[int]) -> None:
    """E23, I8: a revenue split divides what is earned, and changes neither fee nor referral."""
    ends = []
    for payees in ("", money.write_payees([(PROVIDER, "0.7"), ("ag_x", "0.2"), ("ag_y", "0.1")])):
        states = [lock(payees=payees)]
        for amount in amounts:
            states.append(manual.release(states[-1], Fraction(amount)))
        paid = moved(*states)
        earned = sum(paid.get(agent(name), 0) for name in (PROVIDER, "ag_x", "ag_y"))
        ends.append((earned, paid.get(modes.house("USDC"), 0), paid.get(agent(REFERRER), 0)))
    assert ends[0] == ends[1]


@given(st.integers(0, 12), st.integers(0, 12))
def test_a_settlement_pays_both_or_neither(released: int, refunded: int) -> None:
    """P6: both shares fit together what is free, or nothing moves."""
    before = lock(10)
    if released + refunded > 10:
        with pytest.raises(NotCovered):
            manual.settle(before, Atomic(released), Atomic(refunded))
        return
    after = manual.settle(before, Atomic(released), Atomic(refunded))
    assert (after.escrow.released, after.escrow.refunded) == (released, refunded)
    check(after)


# Parts.


def test_a_milestone_is_paid_once() -> None:
    """Rule 5: a paid part is neither paid, delivered, rejected nor disputed again."""
    paid = manual.approve(lock(10, 4, 6), 1)
    steps: list[Step] = [
        lambda a: manual.approve(a, 1),
        lambda a: manual.deliver(a, 1, "", T0),
        lambda a: manual.reject(a, 1, T0),
        lambda a: dispute(a, part=1),
    ]
    for step in steps:
        with pytest.raises(InvalidState, match=r"paid|released"):
            step(paid)


def test_what_is_under_review_is_not_taken_back() -> None:
    """Rule 5: the buyer alone takes back only what no delivery waits for."""
    delivered = manual.deliver(lock(10, 4, 6), 1, "", T0)
    with pytest.raises(NotCovered):
        manual.refund(delivered, Atomic(7))
    assert manual.refund(delivered, None).escrow.refunded == 6
    with pytest.raises(InvalidState):
        manual.refund(manual.refund(delivered, None), None)
    assert manual.give_back(delivered, None).escrow.refunded == 10


@pytest.mark.parametrize("answer", [lambda a: a, lambda a: manual.reject(a, 1, T0)])
def test_what_was_delivered_is_not_taken_back_alone(answer: Step) -> None:
    """X24: not by refund, settlement or closing, nor after a reject; the provider may give it."""
    delivered = answer(manual.deliver(lock(10, 4, 6), 1, "", T0))
    for taken in (manual.refund, lambda a, x: manual.settle(a, Atomic(0), x)):
        with pytest.raises(NotCovered) as refused:
            taken(delivered, Atomic(7))
        assert refused.value.available == 6
        assert taken(delivered, Atomic(6)).escrow.refunded == 6
        with pytest.raises(InvalidState, match="delivered"):
            taken(taken(delivered, Atomic(6)), Atomic(1))
    with pytest.raises(InvalidState, match="delivered"):
        manual.close(delivered, Event.BUYER_CLOSE)
    assert manual.settle(delivered, Atomic(4), Atomic(6)).escrow.status == "settled"
    assert manual.give_back(delivered, None).escrow.status == "refunded"
    assert manual.close(delivered, Event.PROVIDER_CLOSE).escrow.status == "refunded"


@pytest.mark.parametrize("answer", [lambda a: a, lambda a: manual.reject(a, 1, T0)])
def test_the_end_that_pays_is_not_put_off_once_delivered(answer: Step) -> None:
    """T3: else a buyer alone could extend for ever what on_expiry pays; a refund may wait."""
    for on_expiry in (RELEASE, "refund"):
        opened = manual.extend(lock(10, 4, 6, on_expiry=on_expiry), T0 + 2 * DAY)
        delivered = answer(manual.deliver(opened, 1, "", T0))
        if on_expiry == RELEASE:
            with pytest.raises(InvalidState, match="delivered"):
                manual.extend(delivered, T0 + 3 * DAY)
        else:
            assert manual.extend(delivered, T0 + 3 * DAY).escrow.expires_at == T0 + 3 * DAY


BUYERS_OWN: list[Callable[[Agreement, int], Agreement]] = [
    lambda a, x: manual.refund(a, Atomic(x) if x else None),
    lambda a, x: manual.settle(a, Atomic(x // 2), Atomic(x - x // 2)),
    lambda a, _: manual.close(a, Event.BUYER_CLOSE),
    lambda a, _: manual.reject(a, 1, T0),
    lambda a, x: manual.top_up(a, Atomic(x)),
    lambda a, x: manual.release(a, Fraction(x, 2)),
    lambda a, _: manual.approve(a, 2),
    lambda a, x: disputes.withdraw(dispute(a, x or None, part=x % 3 or None), T0),
]


@given(st.lists(st.tuples(st.sampled_from(BUYERS_OWN), st.integers(0, 12)), max_size=12))
def test_no_life_of_a_buyer_alone_takes_a_delivery(steps: list[Any]) -> None:
    """X24: whatever a buyer does without the provider, an arbiter or time, its worth is left."""
    agreement = manual.deliver(lock(10, 4, 6), 1, "", T0)
    for step, amount in steps:
        with suppress(InvalidState, NotCovered):
            agreement = step(agreement, amount)
            check(agreement)
        assert agreement.escrow.released + agreement.escrow.free >= 4


def test_a_disputed_delivery_does_not_hold_the_rest() -> None:
    """Rule 5: what a dispute holds is not counted again as under review."""
    held = dispute(manual.deliver(lock(10, 4, 6), 1, "", T0), part=1)
    assert manual.refund(held, None).escrow.refunded == 6


def test_a_dispute_holds_a_milestone_as_a_whole() -> None:
    """Rule 5: a unit in dispute must not make the rest of a delivery nobody's."""
    delivered = manual.deliver(lock(10, 4, 6), 1, "", T0)
    for amount in (0, 1, 3, 5):
        with pytest.raises(NotCovered):
            dispute(delivered, amount, part=1)
    assert dispute(delivered, 4, part=1) == dispute(delivered, part=1)


def test_a_part_is_never_called_paid_with_less_than_it_is_worth() -> None:
    """Rule 5: a review waits for a dispute over its money, and ends with it."""
    delivered = manual.deliver(lock(10, 4, 6), 1, "", T0)
    waiting = pass_until(dispute(delivered, 8), T0 + DAY)
    assert waiting.parts[0].state is PartState.DELIVERED
    assert waiting.escrow.free == 2
    late = T0 + 2 * DAY
    again = disputes.withdraw(waiting, late)
    assert again.escrow.due_at == late - DAY == again.escrow.expires_at
    paid = pass_until(again, late)
    assert (paid.parts[0].state, paid.escrow.released) == (PartState.PAID, 4)


def test_a_unit_in_dispute_takes_no_delivery_back() -> None:
    """Rule 5: without milestones too, what was delivered is paid when the dispute is withdrawn."""
    delivered = manual.deliver(lock(10), WHOLE, "", T0)
    waiting = pass_until(dispute(delivered, 1), T0 + DAY)
    with pytest.raises(InvalidState):
        manual.refund(waiting, None)
    paid = pass_until(disputes.withdraw(waiting, T0 + DAY), T0 + DAY)
    assert (paid.escrow.status, paid.escrow.released) == ("released", 10)


def test_what_a_dispute_gives_back_can_be_delivered_and_disputed() -> None:
    """Rule 5: an escrow without milestones is paid when nothing is left, and not before."""
    held = manual.approve(dispute(lock(10), 6), WHOLE)
    assert (held.escrow.released, held.parts[0].state) == (4, PartState.PENDING)
    again = disputes.withdraw(held, T0 + 1)
    assert manual.deliver(again, WHOLE, "", T0 + 1).escrow.status == "delivered"
    assert dispute(again).escrow.disputed == 6
    more = manual.top_up(dispute(lock(10)), Atomic(5))
    decided = disputes.resolve(more, Atomic(10), Atomic(0), T0 + 1)
    assert manual.deliver(decided, WHOLE, "", T0 + 1).escrow.status == "delivered"


# Disputes and time.


def test_a_dispute_stops_the_clock_of_its_part() -> None:
    """Rule 5: withdrawn, the review goes on where it stood, and the others never stopped."""
    both = manual.deliver(manual.deliver(lock(10, 4, 6), 1, "", T0), 2, "", T0)
    held = dispute(both, part=1, now=T0 + 100)
    after = pass_until(held, T0 + 5000)
    assert [part.state for part in after.parts] == [PartState.DELIVERED, PartState.PAID]
    again = disputes.withdraw(after, T0 + 5000)
    assert again.parts[0].review_until == T0 + 5000 + REVIEW - 100 == again.escrow.due_at
    assert pass_until(again, T0 + 5499).escrow.released == 6
    assert pass_until(again, T0 + 5500).escrow.status == "released"


@pytest.mark.parametrize(("on_expiry", "paid"), [(RELEASE, 10), ("refund", 4)])
def test_an_undecided_dispute_ends_as_expiry_would(on_expiry: str, paid: int) -> None:
    """Rule 5: after its deadline on_expiry applies to D, recorded as undecided."""
    held = dispute(manual.release(lock(10, on_expiry=on_expiry), Fraction(4)), 6)
    assert held.escrow.due_at == T0 + 7 * DAY
    after, event, when = manual.pass_time(held)
    assert (event, when) == (Event.UNDECIDED, T0 + 7 * DAY)
    assert (after.escrow.released, after.escrow.close_reason) == (paid, "undecided")


@given(st.integers(0, 8), st.integers(0, 8))
def test_an_arbiter_shares_out_all_that_is_disputed(to_provider: int, to_buyer: int) -> None:
    """Rule 5: p + b = D, and nothing else of the escrow is touched."""
    held = dispute(lock(10), 6)
    if to_provider + to_buyer != 6:
        with pytest.raises(NotCovered):
            disputes.resolve(held, Atomic(to_provider), Atomic(to_buyer), T0)
        return
    after = disputes.resolve(held, Atomic(to_provider), Atomic(to_buyer), T0)
    assert (after.escrow.released, after.escrow.refunded) == (to_provider, to_buyer)
    assert (after.escrow.free, after.escrow.disputed) == (4, 0)
    check(after)


@pytest.mark.parametrize("on_expiry", [RELEASE, "refund"])
def test_expiry_leaves_a_running_review_alone(on_expiry: str) -> None:
    """Rule 5, T3: the rest goes by on_expiry, the delivery when its own review ends."""
    late = manual.deliver(lock(10, 4, 6, on_expiry=on_expiry), 1, "", T0 + DAY - 1)
    after = pass_until(late, T0 + DAY)
    assert after.escrow.remaining == 4
    assert after.escrow.released == (6 if on_expiry == RELEASE else 0)
    assert pass_until(after, T0 + DAY - 1 + REVIEW).escrow.remaining == 0


def test_a_delivery_without_a_window_ends_with_the_escrow() -> None:
    """Rule 5: if the terms set no review window, no delivery is paid by itself."""
    delivered = manual.deliver(lock(10, review=None), WHOLE, "", T0)
    assert delivered.escrow.due_at == T0 + DAY
    assert pass_until(delivered, T0 + DAY).escrow.status == "refunded"


@given(st.lists(st.integers(0, 8 * DAY), max_size=6), st.sampled_from([RELEASE, "refund"]))
def test_timers_end_alike_whenever_they_are_applied(looks: list[int], on_expiry: str) -> None:
    """I14, T2: looking at any later moments, in any steps, changes no balance."""
    start = lock(10, 3, 3, on_expiry=on_expiry)
    start = manual.deliver(manual.deliver(start, 1, "", T0), 2, "", T0 + 10)
    start = dispute(start, part=2, now=T0 + 20)
    seen = start
    for moment in sorted(looks):
        seen = pass_until(seen, T0 + moment)
        check(seen)
    end = T0 + 30 * DAY
    assert pass_until(seen, end) == pass_until(start, end)
    assert pass_until(start, end).escrow.remaining == 0


# Everything.

turns = st.lists(
    st.one_of(
        st.sampled_from(sorted(STEPS, key=lambda event: event.value)),
        st.integers(0, 3 * DAY),
        st.integers(1, 4).map(lambda part: (part, part % 2 == 0)),
    ),
    max_size=25,
)


@given(turns, st.booleans(), st.sampled_from([(), (4, 4), (10,)]))
def test_any_sequence_of_events_keeps_the_rules(
    turns: list[Any], releases: bool, milestones: tuple[int, ...]
) -> None:
    """I4 to I9: whatever happens, nothing is lost, and every unit has a timer or an owner."""
    now = T0
    states = [lock(10, *milestones, on_expiry=RELEASE if releases else "refund")]
    for turn in turns:
        try:
            if isinstance(turn, int):
                now += turn
                after = pass_until(states[-1], now)
            elif isinstance(turn, tuple):
                after = dispute(states[-1], turn[0] if turn[1] else None, None, now=now)
            else:
                after = STEPS[turn](states[-1])
        except (InvalidState, NotCovered):
            continue
        check(after)
        states.append(after)
    states.append(pass_until(states[-1], now + 400 * DAY))
    ended = states[-1].escrow
    assert ended.remaining == 0
    paid = moved(*states)
    assert paid.get(agent(BUYER), 0) == ended.refunded - (ended.amount - 10)
    assert sum(paid.values()) == 0

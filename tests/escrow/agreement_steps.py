"""Manual escrows for tests of the pure rules: one of every phase, and every event as a function."""

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise

from x402mw.core.amounts import Atomic
from x402mw.escrow.rules import dispute as disputes
from x402mw.escrow.rules import manual, money, step
from x402mw.escrow.rules.agreement import WHOLE, Agreement, Part
from x402mw.escrow.rules.table import Event
from x402mw.escrow.rules.values import MANUAL, REFUND, new_escrow

DOLLAR = 1_000_000
T0 = 1_800_000_000
DAY = 86_400
REVIEW = 600
BUYER, PROVIDER, REFERRER = "ag_b", "ag_p", "ag_r"

Step = Callable[[Agreement], Agreement]


def lock(
    amount: int = 10 * DOLLAR,
    *milestones: int,
    on_expiry: str = REFUND,
    review: int | None = REVIEW,
    payees: str = "",
) -> Agreement:
    """A manual escrow with money in it, that ends a day from T0."""
    parts = [Part(n, f"m{n}", Atomic(worth)) for n, worth in enumerate(milestones, start=1)]
    empty = Agreement(
        escrow=new_escrow(
            escrow_id="esc_" + "0" * 32,
            kind=MANUAL,
            buyer=BUYER,
            provider=PROVIDER,
            asset="USDC",
            fee_bps=100,
            referral_bps=1500,
            referrer=REFERRER,
            payees=payees,
            memo="",
            on_expiry=on_expiry,
            created_at=T0,
            expires_at=T0 + DAY,
        ),
        parts=tuple(parts) or (Part(WHOLE, "", Atomic(0)),),
        review_seconds=review,
    )
    return manual.top_up(empty, Atomic(amount))


def dispute(
    agreement: Agreement,
    amount: int | None = None,
    part: int | None = None,
    *,
    now: int = T0,
    by: str = BUYER,
) -> Agreement:
    """A party, the buyer if none is named, disputes something for a week."""
    return disputes.open_dispute(
        agreement,
        by,
        number=1,
        part=part,
        amount=None if amount is None else Atomic(amount),
        now=now,
        deadline=now + 7 * DAY,
    )


def first(agreement: Agreement) -> int:
    """The number of its first part."""
    return agreement.parts[0].number


def check_evidence(agreement: Agreement) -> Agreement:
    """Evidence changes nothing of an agreement."""
    disputes.check_evidence(agreement)
    return agreement


STEPS: dict[Event, Step] = {
    Event.TOP_UP: lambda a: manual.top_up(a, Atomic(DOLLAR)),
    Event.EXTEND: lambda a: manual.extend(a, a.escrow.expires_at + 60),
    Event.RELEASE: lambda a: manual.release(a, Fraction(1)),
    Event.SETTLE: lambda a: manual.settle(a, Atomic(1), Atomic(1)),
    Event.CONDITION: manual.meet_condition,
    Event.DELIVER: lambda a: manual.deliver(a, a.parts[-1].number, "proof", T0),
    Event.APPROVE: lambda a: manual.approve(a, a.parts[-1].number),
    Event.REJECT: lambda a: manual.reject(a, first(a), T0),
    Event.REFUND: lambda a: manual.refund(a, Atomic(1)),
    Event.GIVE_BACK: lambda a: manual.give_back(a, Atomic(1)),
    Event.BUYER_CLOSE: lambda a: manual.close(a, Event.BUYER_CLOSE),
    Event.PROVIDER_CLOSE: lambda a: manual.close(a, Event.PROVIDER_CLOSE),
    Event.DISPUTE: lambda a: dispute(a, None, by=PROVIDER),
    Event.EVIDENCE: check_evidence,
    Event.WITHDRAW: lambda a: disputes.withdraw(a, T0 + 1),
    Event.RESOLVE: lambda a: disputes.resolve(a, a.escrow.disputed, Atomic(0), T0 + 1),
    Event.RETURN: lambda a: a._replace(escrow=money.give_money_back(a.escrow, Atomic(0))),
}
"""Each event by hand, small enough to fit an escrow with two milestones, the first delivered."""

TIMED = {Event.REVIEW_END, Event.UNDECIDED, Event.DEADLINE}


def pass_until(agreement: Agreement, until: int) -> Agreement:
    """Does all that time has done by a second."""
    while (timer := step.next_timer(agreement)) is not None and timer[0] <= until:
        agreement = manual.pass_time(agreement)[0]
    return agreement


def moved(*states: Agreement) -> dict[str, int]:
    """What a row of states moved on every account, all steps together."""
    return money.balance_changes(
        move
        for before, after in pairwise(states)
        for move in money.transfers(before.escrow, after.escrow)
    )


def check(agreement: Agreement) -> None:
    """I5, I7, I9, M4 and the timers of one state."""
    escrow = agreement.escrow
    amounts = (escrow.released, escrow.refunded, escrow.disputed, escrow.free)
    assert min(amounts) >= 0
    assert 0 <= agreement.carry < 1
    assert escrow.released + agreement.carry <= escrow.amount - escrow.refunded
    rates = (escrow.fee_bps, escrow.referral_bps)
    assert (escrow.fee, escrow.referral) == money.split_fee(escrow.released, *rates)
    assert (agreement.dispute is None) == (escrow.disputed == 0)
    assert (escrow.close_reason is None) == (escrow.remaining > 0)
    timer = step.next_timer(agreement)
    assert escrow.due_at == (None if timer is None else timer[0])
    assert (escrow.status in ("released", "refunded", "settled")) == (escrow.remaining == 0)
    assert (escrow.status == "disputed") == (escrow.disputed > 0)
    assert (escrow.due_at is None) == (escrow.remaining == 0), "money that no timer ever frees"

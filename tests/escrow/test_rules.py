"""The pure rules of an escrow: `docs/money.md` 3 to 6."""

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x402mw.core.amounts import AMOUNT_MAX, Atomic, to_atomic, to_atomic_floor
from x402mw.core.errors import AmountInvalid
from x402mw.escrow import modes
from x402mw.escrow.bodies import read_total
from x402mw.escrow.rules import money, outage
from x402mw.escrow.rules import session as rules
from x402mw.escrow.rules.table import TRANSITIONS, Event, InvalidState
from x402mw.escrow.rules.values import SESSION, Escrow, Phase

DOLLAR = 1_000_000
T0 = 1_800_000_000
amounts = st.integers(0, 50 * DOLLAR).map(Atomic)


def session(amount: int = 10 * DOLLAR, *, fee_bps: int = 100) -> Escrow:
    """An open session with money in it."""
    empty = rules.new_session(
        escrow_id="esc_" + "0" * 32,
        buyer="ag_b",
        provider="ag_p",
        asset="USDC",
        fee_bps=fee_bps,
        session_key="",
        journal="jr_" + "1" * 32,
        memo="",
        created_at=T0,
        expires_at=T0 + 86_400,
    )
    return rules.issue_token(rules.top_up(empty, Atomic(amount)), T0 + 900)


def payouts(*states: Escrow) -> dict[str, int]:
    """What a row of states moved on every account, all steps together."""
    steps = pairwise(states)
    return money.balance_changes(
        move for before, after in steps for move in money.transfers(before, after)
    )


@pytest.mark.parametrize("parts", [1, 7, 1000, 10_000])
def test_a_thousand_dollars_pay_ten_in_fees_however_they_are_split(parts: int) -> None:
    """Rule 3: the fee follows the cumulative gross, so splitting changes nothing."""
    total = 1000 * DOLLAR
    states = [session(total)]
    for part in range(1, parts + 1):
        states.append(rules.release(states[-1], Atomic(total * part // parts)))
    moved = payouts(*states)
    assert moved["agent:ag_p"] == 990 * DOLLAR
    assert moved[modes.house("USDC")] == 10 * DOLLAR
    assert moved["escrow:" + states[0].escrow_id] == -total


def test_releases_below_the_fee_unit_still_pay_the_right_fee() -> None:
    """Rule 3: $1.00 in releases of $0.00005 pays $0.01; per-release rounding pays 0 or 0.02."""
    states = [session(DOLLAR)]
    for released in range(50, DOLLAR + 1, 50):
        states.append(rules.release(states[-1], Atomic(released)))
    assert payouts(*states)[modes.house("USDC")] == to_atomic("0.01")


@given(st.integers(0, AMOUNT_MAX), st.integers(0, 10_000), st.integers(0, 10_000))
def test_fee_and_referral_never_exceed_what_they_are_part_of(
    released: int, fee_bps: int, referral_bps: int
) -> None:
    """Rule 3 and I7: 0 <= referral <= fee <= released, up to the largest amount."""
    fee, referral = money.split_fee(Atomic(released), fee_bps, referral_bps)
    assert 0 <= referral <= fee <= released
    assert fee == released * fee_bps // 10_000
    assert referral == fee * referral_bps // 10_000


def test_referral_is_fifteen_percent_of_the_fee() -> None:
    """Rule 3: of $1,000 at 100 bps the referrer would get $1.50."""
    assert money.split_fee(Atomic(1000 * DOLLAR), 100, 1500) == (10 * DOLLAR, to_atomic("1.50"))


@given(st.lists(st.tuples(st.booleans(), amounts), max_size=20), st.randoms())
def test_order_of_redeem_and_release_does_not_matter(steps: list, random: object) -> None:
    """I15 and I16: any order of the same claims, in any parts, ends in the same split."""
    shuffled = list(steps)
    random.shuffle(shuffled)  # type: ignore[attr-defined]  # a Random from Hypothesis
    ends = []
    for order in (steps, shuffled):
        states = [session()]
        for redeem, amount in order:
            change = rules.redeem if redeem else rules.release
            states.append(change(states[-1], amount))
        states.append(rules.close_by_provider(states[-1], Atomic(0)))
        ends.append((states[-1], payouts(*states)))
    assert ends[0] == ends[1]


@given(amounts, amounts, amounts)
def test_the_counter_is_clamped_and_shared(deposit: Atomic, x: Atomic, y: Atomic) -> None:
    """Rule 4: R := max(R, min(y, cumulative, L)); releases and vouchers move one counter."""
    after = rules.redeem(rules.release(session(deposit), x), y)
    assert after.released == max(min(x, deposit), min(y, deposit))
    assert after.redeemed == min(y, deposit)
    assert after.redeemed <= after.released <= after.amount


def test_every_pair_outside_the_table_is_refused() -> None:
    """Rule 5: one table; any other event is refused and names the state."""
    at = [
        session(),
        rules.close_by_buyer(session(), T0),
        rules.close_by_provider(session(), Atomic(1)),
    ]
    does = {
        Event.TOP_UP: lambda escrow: rules.top_up(escrow, Atomic(1)),
        Event.TOKEN: lambda escrow: rules.issue_token(escrow, T0),
        Event.EXTEND: lambda escrow: rules.extend(escrow, T0 + 1_000_000),
        Event.RELEASE: lambda escrow: rules.release(escrow, Atomic(1)),
        Event.REDEEM: lambda escrow: rules.redeem(escrow, Atomic(1)),
        Event.BUYER_CLOSE: lambda escrow: rules.close_by_buyer(escrow, T0),
        Event.REVOKE: lambda escrow: rules.revoke(escrow, T0),
        Event.PROVIDER_CLOSE: lambda escrow: rules.close_by_provider(escrow, Atomic(1)),
        Event.DEADLINE: rules.reach_deadline,
        Event.RETURN: lambda escrow: money.give_money_back(escrow, Atomic(0)),
    }
    known = {
        event for (kind, _), events in TRANSITIONS.items() if kind == SESSION for event in events
    }
    assert known == does.keys()
    for escrow, event in product(at, does):
        if event in TRANSITIONS[SESSION, escrow.phase]:
            does[event](escrow)
            continue
        with pytest.raises(InvalidState) as refused:
            does[event](escrow)
        assert refused.value.status == escrow.status


def test_each_event_leads_to_its_phase() -> None:
    """Rule 5: a buyer's close leads to closing, a provider's and a deadline to the end."""
    closing = rules.close_by_buyer(session(), T0)
    assert closing.phase is Phase.CLOSING
    assert rules.redeem(closing, Atomic(1)).phase is Phase.CLOSING
    for escrow in (session(), closing):
        assert rules.close_by_provider(escrow, Atomic(1)).phase is Phase.ENDED
        assert rules.reach_deadline(escrow).phase is Phase.ENDED
    assert rules.extend(session(), T0 + 1_000_000).phase is Phase.OPEN


@pytest.mark.parametrize(
    ("released", "status"), [(0, "refunded"), (10 * DOLLAR, "released"), (1, "settled")]
)
def test_how_a_session_ended_shows_in_its_status(released: int, status: str) -> None:
    """Rule 5: nothing released = refunded, all = released, some of each = settled."""
    ended = rules.close_by_provider(session(), Atomic(released))
    assert (ended.status, ended.remaining, ended.close_reason) == (status, 0, "provider_close")


def test_an_open_session_shows_whether_anything_was_released() -> None:
    """Rule 5: locked until the first unit is released, then partially_released, even if all."""
    assert session().status == "locked"
    assert rules.release(session(), Atomic(1)).status == "partially_released"
    assert rules.release(session(), Atomic(AMOUNT_MAX)).status == "partially_released"


def test_a_deposit_cannot_grow_out_of_range() -> None:
    """M1: amounts stay below 2^63, also by addition."""
    with pytest.raises(AmountInvalid):
        rules.top_up(session(AMOUNT_MAX), Atomic(1))


@pytest.mark.parametrize(
    ("now", "exp"),
    [(T0, T0 + 600), (T0 + 85_500, T0 + 86_100), (T0 + 85_501, T0 + 86_100), (T0 + 86_100, None)],
)
def test_no_token_outlives_its_escrow(now: int, exp: int | None) -> None:
    """T4: exp = min(now + 600, expires_at - S); in the last S seconds no token is issued."""
    assert rules.token_expiry(now, T0 + 86_400, 300) == exp


@given(st.integers(0, 86_400))
def test_a_token_claims_until_the_escrow_expires_at_most(age: int) -> None:
    """T4: claim_until = exp + S never reaches past expires_at."""
    exp = rules.token_expiry(T0 + age, T0 + 86_400, 300)
    assert exp is None or T0 + age < exp <= T0 + 86_400 - 300


def test_deadlines_wait_for_an_escrow_that_was_down() -> None:
    """T5: a session deadline applies at max(deadline, up_since + 600)."""
    assert outage.effective_deadline(T0, T0 - 10_000) == T0
    assert outage.effective_deadline(T0, T0 - 1) == T0 + 599
    closing = rules.close_by_buyer(session(), T0)
    assert closing.due_at == T0 + 900
    assert not outage.is_due(closing, T0 + 899, T0 - 10_000)
    assert outage.is_due(closing, T0 + 900, T0 - 10_000)
    assert not outage.is_due(closing, T0 + 900, T0 + 301)
    assert not outage.is_due(rules.reach_deadline(closing), T0 + 900, T0 - 10_000)


def test_a_session_without_any_token_closes_at_once() -> None:
    """Rule 5: with no token issued there is nothing to wait for."""
    escrow = session()._replace(claim_until=None)
    assert rules.close_by_buyer(escrow, T0).due_at == T0


def test_the_newest_claim_deadline_never_falls() -> None:
    """Rule 5: a close waits for the largest claim_until ever issued."""
    assert rules.issue_token(session(), T0).claim_until == T0 + 900


def test_why_an_escrow_ended_is_told() -> None:
    """Rule 5: close_reason names the cause, also when a deadline finished a close."""
    assert rules.reach_deadline(session()).close_reason == "expired_refund"
    closing = rules.close_by_buyer(session(), T0)
    assert rules.reach_deadline(closing).close_reason == "buyer_close"


@given(st.from_regex(r"\A[0-9]{1,14}(\.[0-9]{0,8})?(e-?[0-9])?\Z") | st.text(max_size=12))
def test_a_total_is_read_the_same_by_the_short_way(text: str) -> None:
    """M4: the short way for plain totals of a batch gives what the exact one gives."""
    try:
        exactly = to_atomic_floor(text)
    except AmountInvalid:
        with pytest.raises(AmountInvalid):
            read_total(text)
    else:
        assert read_total(text) == exactly

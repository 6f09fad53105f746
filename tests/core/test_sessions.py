"""Sessions: admit, settle and close in any order keep the account sound."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from x402mw.core.amounts import Atomic
from x402mw.core.sessions import (
    TRANSITIONS,
    Account,
    NotCovered,
    SessionEnded,
    SessionEvent,
    SessionState,
    admit,
    move,
    settle,
)

SMALL = st.integers(0, 40)


class Sessions(RuleBasedStateMachine):
    """A provider's account under any sequence of calls, charges and closes."""

    def __init__(self) -> None:
        super().__init__()
        self.account = Account()
        self.before = self.account
        self.open: list[Atomic] = []

    def step(self, account: Account) -> None:
        """Takes the next account and remembers the one before."""
        self.before, self.account = self.account, account

    @rule(cumulative=SMALL, amount=SMALL, deposit=SMALL)
    def call(self, cumulative: int, amount: int, deposit: int) -> None:
        """A voucher arrives: it is admitted exactly when rule 1 says so."""
        best = max(self.account.best, cumulative)
        spent = self.account.charged + self.account.reserved
        covered = spent + amount <= best <= max(self.account.deposit, deposit)
        try:
            admitted = admit(
                self.account,
                cumulative=Atomic(cumulative),
                amount=Atomic(amount),
                deposit=Atomic(deposit),
            )
        except NotCovered:
            assert not covered
        except SessionEnded:
            assert self.account.state is not SessionState.OPEN
        else:
            assert covered
            self.step(admitted)
            self.open.append(Atomic(amount))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """A call ends with any charge up to what it reserved, whatever the state."""
        held = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        charge = Atomic(data.draw(st.integers(0, held)))
        self.step(settle(self.account, reserved=held, charge=charge))

    @rule(event=st.sampled_from([SessionEvent.CLOSE, SessionEvent.CLOSED]))
    def end(self, event: SessionEvent) -> None:
        """The session closes, again and again if need be."""
        self.step(move(self.account, event))

    @invariant()
    def sound(self) -> None:
        """Charged + reserved <= best <= deposit, and reserved is what is open."""
        account = self.account
        assert 0 <= account.charged + account.reserved <= account.best <= account.deposit
        assert account.reserved == sum(self.open)

    @invariant()
    def only_reserved_falls(self) -> None:
        """Charged, best and deposit never fall, and no closed session opens again."""
        for name in ("charged", "best", "deposit"):
            assert getattr(self.account, name) >= getattr(self.before, name)
        order = list(SessionState)
        assert order.index(self.account.state) >= order.index(self.before.state)


TestSessions = Sessions.TestCase


@given(st.randoms(use_true_random=False))
def test_a_hundred_parallel_vouchers_are_all_admitted(chance: random.Random) -> None:
    """A hundred calls on one session pass in whatever order their vouchers arrive."""
    vouchers = [Atomic(10 * (index + 1)) for index in range(100)]
    chance.shuffle(vouchers)
    account, late = Account(), []
    for cumulative in vouchers:
        try:
            account = admit(account, cumulative=cumulative, amount=Atomic(10), deposit=Atomic(1000))
        except NotCovered:
            late.append(cumulative)
    for cumulative in late:
        account = admit(account, cumulative=cumulative, amount=Atomic(10), deposit=Atomic(1000))
    assert (account.reserved, account.best) == (1000, 1000)


def test_headroom_admits_in_any_order() -> None:
    """A hundred vouchers that share one cover are admitted at once, none asked again."""
    account = Account()
    for _ in range(100):
        account = admit(account, cumulative=Atomic(1000), amount=Atomic(10), deposit=Atomic(1000))
    with pytest.raises(NotCovered):
        admit(account, cumulative=Atomic(1000), amount=Atomic(1), deposit=Atomic(1000))


@pytest.mark.parametrize(("reserved", "charge"), [(5, 6), (5, -1), (11, 0), (-1, -1)])
def test_a_charge_stays_within_its_reservation(reserved: int, charge: int) -> None:
    """More than was reserved, or less than nothing, is a mistake of the caller's."""
    account = Account(Atomic(10), Atomic(10), Atomic(0), Atomic(10))
    with pytest.raises(ValueError, match="between nothing"):
        settle(account, reserved=Atomic(reserved), charge=Atomic(charge))


@pytest.mark.parametrize("state", SessionState)
@pytest.mark.parametrize("event", SessionEvent)
def test_the_transition_table_is_whole(state: SessionState, event: SessionEvent) -> None:
    """Everything is possible in every state but a new call on a session that ends."""
    account = replace(Account(), state=state)
    if event is SessionEvent.ADMIT and state is not SessionState.OPEN:
        with pytest.raises(SessionEnded):
            move(account, event)
    else:
        assert move(account, event).state is TRANSITIONS[state, event]

"""A wallet under random use: whatever happens, it stays within its limits and forgets nothing."""

from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.client.scripted import ORIGIN, route
from tests.client.world import World
from x402mw.core.errors import LimitExceeded
from x402mw_client import Limits
from x402mw_client.purse import Stale
from x402mw_client.sessions import Call, Offer, Session, Subject

TOTAL, PER_REQUEST, PER_SESSION, MAX_OPEN, DEPOSIT = 90_000, 20_000, 60_000, 30_000, 70_000
SUBJECT = Subject("GET", ORIGIN, "/item/a", b"h" * 32, ORIGIN + "/item/a")


class WalletMachine(RuleBasedStateMachine):
    """Signs, settles, frees and abandons calls in two sessions, against a plain model."""

    @initialize()
    def start(self) -> None:
        """Two sessions with two providers, in one wallet."""
        world = World("sync")
        world.connect(Limits("0.02", "0.09", session="0.06", max_open="0.03"), deposit="0.07")
        world.http.get(f"{ORIGIN}/item/a")
        world.http.get("https://other.example/item/a")
        self.purse = world.wallet.state.purse
        self.sessions: list[Session] = list(self.purse.sessions.values())
        self.open: list[tuple[Call, int]] = []
        self.charged = {session.id: 1000 for session in self.sessions}

    def spent(self, session: Session) -> int:
        """What the model says that a session may cost."""
        held = sum(amount for call, amount in self.open if call.session is session)
        return self.charged[session.id] + held

    def offer(self, session: Session, amount: int) -> Offer:
        """An offer of another price in the same session."""
        terms = route("GET", "/item/{name}", amount)
        return Offer(terms, session.offer.accepts)

    @rule(which=st.integers(0, 1), amount=st.integers(1, 25_000))
    def sign(self, which: int, amount: int) -> None:
        """A call is signed exactly when every limit and the deposit have room for it."""
        session = self.sessions[which]
        before = {s.id: (s.charged, s.held, s.cumulative) for s in self.sessions}
        held = self.spent(session) - self.charged[session.id]
        allowed = (
            amount <= PER_REQUEST
            and sum(map(self.spent, self.sessions)) + amount <= TOTAL
            and self.spent(session) + amount <= PER_SESSION
        )
        try:
            signed = self.purse.sign(session, self.offer(session, amount), SUBJECT, None)
        except LimitExceeded:
            assert not allowed
            signed = None
        except Stale:
            assert self.spent(session) + amount > session.deposit
            signed = None
        else:
            assert allowed
            assert (signed is None) == (held > 0 and held + amount > MAX_OPEN)
        if signed is None:
            assert before == {s.id: (s.charged, s.held, s.cumulative) for s in self.sessions}
        else:
            call, form = signed
            assert form.signed.voucher.cumulative >= self.spent(session) + amount
            self.open.append((call, amount))

    @rule(data=st.data())
    def sign_again(self, data: st.DataObject) -> None:
        """Another form of the same call holds the larger of both amounts, once."""
        if not self.open:
            return
        place = data.draw(st.integers(0, len(self.open) - 1))
        call, amount = self.open[place]
        dearer = data.draw(st.integers(1, PER_REQUEST))
        try:
            signed = self.purse.sign(call.session, self.offer(call.session, dearer), SUBJECT, call)
        except (LimitExceeded, Stale):
            return
        if signed is not None:
            assert signed[0] is call
            self.open[place] = (call, max(amount, dearer))

    @rule(data=st.data(), twice=st.booleans())
    def settle(self, data: st.DataObject, twice: bool) -> None:
        """A charge is booked once, whatever the provider repeats."""
        call, amount = self._take(data)
        if call is None:
            return
        charge = data.draw(st.integers(0, amount))
        self.charged[call.session.id] += charge
        for _ in range(2 if twice else 1):
            self.purse.settle(call, charge)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        """A refused call leaves nothing behind."""
        call, _ = self._take(data)
        if call is not None:
            self.purse.free(call)
            self.purse.free(call)

    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        """A call that nobody waits for stays held."""
        if self.open:
            self.purse.leave(data.draw(st.sampled_from(self.open))[0])

    def _take(self, data: st.DataObject) -> Any:
        if not self.open:
            return None, 0
        return self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))

    @invariant()
    def books_are_exact(self) -> None:
        """The wallet's figures are the model's, and within every limit."""
        if not hasattr(self, "sessions"):
            return
        for session in self.sessions:
            assert session.spent == self.spent(session)
            assert session.charged == self.charged[session.id]
            assert session.spent <= PER_SESSION
            assert session.charged <= session.cumulative <= session.deposit <= DEPOSIT
        live = sum(one.at_worst(self.purse.clock()) for one in self.purse.sessions.values())
        assert self.purse.spent() == self.purse.past.worst + live <= TOTAL


TestWallet = WalletMachine.TestCase
TestWallet.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_the_deposit_rule() -> None:
    """Target = min(max(min_escrow, suggested, 100 x amount), deposit)."""
    from x402mw_client.sessions import deposit_target

    assert deposit_target(10, 0, 0, 10_000) == 1000
    assert deposit_target(10, 5000, 0, 10_000) == 5000
    assert deposit_target(10, 0, 7000, 10_000) == 7000
    assert deposit_target(1000, 0, 0, 10_000) == 10_000

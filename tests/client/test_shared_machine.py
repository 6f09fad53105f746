"""Wallets on one file under random use and sudden ends: one set of books, true for all of them."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.client.scripted import ORIGIN, route
from tests.client.world import ScriptedWallet, World
from x402mw.core.errors import LimitExceeded
from x402mw_client import Limits
from x402mw_client.purse import Purse
from x402mw_client.sessions import Call, Offer, Stale, Subject

TOTAL, PER_SESSION, MAX_OPEN = 90_000, 60_000, 30_000
LIMITS = Limits("0.02", "0.09", session="0.06", max_open="0.03")
SUBJECT = Subject("GET", ORIGIN, "/item/a", b"h" * 32, ORIGIN + "/item/a")
WALLETS = 3


@dataclass
class Held:
    """What the model knows of a call: whose it is, or nobody's, and what it holds."""

    call: Call
    amount: int
    owner: int | None


class SharedWalletMachine(RuleBasedStateMachine):
    """Up to three processes sign, settle, give up and die, against a plain model."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "wallet.db"
        self.wallets: dict[int, ScriptedWallet] = {}
        self.open: dict[int, Held] = {}
        self.started = 0

    def teardown(self) -> None:
        """Leaves nothing behind."""
        for wallet in self.wallets.values():
            wallet._memory.close()
        self.folder.cleanup()

    @initialize()
    def begin(self) -> None:
        """Two sessions with two providers, opened by the first process."""
        self.world = World("sync")
        self.world.connect(LIMITS, path=self.path, deposit="0.07")
        self.world.http.get(f"{ORIGIN}/item/a")
        self.world.http.get("https://other.example/item/a")
        self.wallets[0] = self.world.wallet
        self.ids = list(self.purse(0).sessions)
        self.charged = dict.fromkeys(self.ids, 1000)
        self.cumulative = dict.fromkeys(self.ids, 1000)

    def purse(self, which: int) -> Purse:
        """The purse of one process."""
        return self.wallets[which].state.purse

    def held(self, name: bytes) -> int:
        """What the model says is held in a session."""
        return sum(held.amount for held in self.open.values() if held.call.session.id == name)

    @precondition(lambda self: len(self.wallets) < WALLETS)
    @rule()
    def start(self) -> None:
        """One more process opens the file; it takes over what the dead left."""
        self.started += 1
        escrow, clock = self.world.escrow, self.world.clock
        self.wallets[self.started] = ScriptedWallet(
            escrow, limits=LIMITS, clock=clock, path=self.path, deposit="0.07"
        )

    @precondition(lambda self: len(self.wallets) > 1)
    @rule(data=st.data(), changing=st.booleans())
    def die(self, data: st.DataObject, changing: bool) -> None:
        """A process is gone, between two changes or within one: then that did not happen."""
        which = data.draw(st.sampled_from(sorted(self.wallets)))
        memory = self.wallets.pop(which)._memory
        if changing:
            memory._db.execute("BEGIN IMMEDIATE")
            memory._db.execute("UPDATE sessions SET charged = 0, held = 0")
            memory._db.execute("DELETE FROM calls")
        memory.close()
        for held in self.open.values():
            held.owner = None if held.owner == which else held.owner

    @rule(data=st.data(), first=st.booleans(), amount=st.integers(1, 25_000))
    def sign(self, data: st.DataObject, first: bool, amount: int) -> None:
        """A call is signed exactly when every limit has room for it, whoever used the rest."""
        which = data.draw(st.sampled_from(sorted(self.wallets)))
        purse, name = self.purse(which), self.ids[0 if first else 1]
        purse.look()
        session = purse.sessions[name]
        session.proven = True
        offer = Offer(route("GET", "/item/{name}", amount), session.offer.accepts)
        spent = {one: self.charged[one] + self.held(one) for one in self.ids}
        within = (
            amount <= 20_000
            and sum(spent.values()) + amount <= TOTAL
            and spent[name] + amount <= PER_SESSION
        )
        try:
            signed = purse.sign(session, offer, SUBJECT, None)
        except LimitExceeded:
            assert not within
            return
        except Stale:
            assert spent[name] + amount > session.deposit
            return
        assert within
        waits = self.held(name) > 0 and self.held(name) + amount > MAX_OPEN
        assert (signed is None) == waits
        if signed is not None:
            call, form = signed
            cumulative = form.signed.voucher.cumulative
            assert cumulative >= max(spent[name] + amount, self.cumulative[name])
            self.cumulative[name] = cumulative
            self.open[call.seq] = Held(call, amount, which)

    def mine(self, data: st.DataObject) -> tuple[int, Held] | None:
        """Any call of a process that lives."""
        seqs = [seq for seq, held in self.open.items() if held.owner in self.wallets]
        return None if not seqs else (seq := data.draw(st.sampled_from(seqs)), self.open[seq])

    @rule(data=st.data(), free=st.booleans(), twice=st.booleans())
    def finish(self, data: st.DataObject, free: bool, twice: bool) -> None:
        """The process that waits for a call books its outcome, once."""
        found = self.mine(data)
        if found is None:
            return
        seq, held = found
        purse = self.purse(held.owner or 0)
        charge = 0 if free else data.draw(st.integers(0, held.amount))
        for _ in range(2 if twice else 1):
            if free:
                purse.free(held.call)
            else:
                purse.settle(held.call, charge)
        self.charged[held.call.session.id] += charge
        del self.open[seq]

    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        """A call that nobody waits for any more stays held, and is anybody's to ask about."""
        found = self.mine(data)
        if found is not None:
            self.purse(found[1].owner or 0).leave(found[1].call)
            found[1].owner = None

    @rule(data=st.data(), late=st.booleans())
    def learn(self, data: st.DataObject, late: bool) -> None:
        """Any process finds the calls of the dead, and only those, and books them once."""
        which = data.draw(st.sampled_from(sorted(self.wallets)))
        purse = self.purse(which)
        purse.recover()
        found = {seq: c for s in purse.sessions.values() for seq, c in s.doubtful.items()}
        nobodys = [seq for seq, held in self.open.items() if held.owner is None]
        assert found.keys() & self.open.keys() == set(nobodys)
        if not nobodys:
            return
        seq = data.draw(st.sampled_from(nobodys))
        held = self.open.pop(seq)
        charge = data.draw(st.integers(0, held.amount))
        purse.settle(found[seq], charge)
        self.charged[held.call.session.id] += charge
        if late and which in self.wallets:
            # Whoever gave it up hears of it after all.
            held.call.charge = None
            purse.settle(held.call, held.amount)

    @invariant()
    def books_are_one(self) -> None:
        """Every process has the model's figures, and they are within every limit."""
        for wallet in self.wallets.values():
            purse = wallet.state.purse
            purse.look()
            for name, session in purse.sessions.items():
                assert (session.charged, session.held) == (self.charged[name], self.held(name))
                assert session.cumulative == self.cumulative[name]
                assert session.spent <= min(PER_SESSION, session.cumulative) <= session.deposit
            live = sum(one.at_worst(purse.clock()) for one in purse.sessions.values())
            assert purse.spent() == purse.past.worst + live <= TOTAL


TestSharedWallet = SharedWalletMachine.TestCase
TestSharedWallet.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)

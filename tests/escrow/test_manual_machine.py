"""The ledger under every operation of both kinds of escrow, with crashes in the middle of them.

As in `test_machine`: two worlds, one swept after every step and one never, the whole books proven
after every step (I1 to I11, I14, I16, I18, I19). Besides, any statement of any transaction may
fail: then nothing has happened, and the same key again has the effect of one call (I13).
"""

import os
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import select

from tests.escrow.full_world import (
    ARBITER,
    BUYER,
    OPERATIONS,
    PROVIDER,
    TIME_EVENTS,
    FullWorld,
    close,
    new_manual,
    operations,
)
from tests.escrow.test_machine import PostgresqlTrade, Trade, amounts, picks
from tests.support.escrow import reading
from x402mw.core.amounts import USDC, Atomic, display
from x402mw.escrow import disputes, manual, rules, schema, transfers
from x402mw.escrow.account_bodies import NewTransfer
from x402mw.escrow.idempotency import Answer, Key

LONG = bool(os.environ.get("X402MW_LONG"))
SECONDS = (
    (disputes, "DISPUTE_SECONDS", 1500),
    (rules.dispute, "ANSWER_SECONDS", 400),
    (rules.manual, "ANSWER_SECONDS", 400),
)
"""Shorter, so that lives of an hour see what takes days."""

terms = st.fixed_dictionaries(
    {
        "on_expiry": st.sampled_from(["release", "refund"]),
        "seconds": st.sampled_from([300, 1800, 3000]),
        "review": st.sampled_from([None, 60, 700]),
        "milestones": st.booleans(),
        "payees": st.booleans(),
        "referred": st.booleans(),
        "condition": st.booleans(),
    }
)
locked = st.integers(USDC.unit, 8 * USDC.unit).map(Atomic)
some = st.one_of(amounts, st.integers(1, 3 * USDC.unit).map(Atomic))
Wish = tuple[str, Atomic, int, str, int]
PAYS = ("release", "release", "up_to", "milestone", "approve", "settle", "top_up")
WORKS = ("deliver", "deliver", "reject", "approve", "refund", "give_back", "extend")
ARGUES = ("dispute", "dispute_part", "dispute_all", "evidence", "withdraw", "resolve")


SIDES = ("dispute", "dispute_part", "dispute_all", "evidence", "withdraw")
"""What either party may do, or try."""


def wishes_of(*names: str) -> st.SearchStrategy[list[Wish]]:
    """What, with which amount and part, how many fractions of a unit, and whether by who may."""
    wish = st.tuples(
        st.sampled_from(names),
        some,
        st.integers(0, 5),
        st.sampled_from(["", "5", "25", "999999"]),
        st.integers(0, 63),
    )
    return st.lists(wish, min_size=1, max_size=5)


class Market(Trade):
    """Both kinds of escrow, everybody, and crashes."""

    new_world = FullWorld
    worlds: list[Any]

    def __init__(self) -> None:
        super().__init__()
        self.parties: dict[int, tuple[int, int]] = {}
        self.crash: int | None = None
        self.target: int | None = None
        self.patches = ExitStack()
        for patch in SECONDS:
            self.patches.enter_context(mock.patch.object(*patch))

    @invariant()
    def books_hold(self) -> None:
        """As in a smaller market, and every agreement is one that the rules allow."""
        super().books_hold()
        for world in getattr(self, "worlds", ()):
            self.run(world.check_agreements())

    def teardown(self) -> None:
        """Also: what time did has no actor, and what an agent did has one."""
        for world in self.worlds if hasattr(self, "worlds") else ():
            self.run(check_actors(world))
        super().teardown()
        self.patches.close()

    async def _once(self, world: Any, caller: int, party: str, work: Any, key: Key) -> Answer:
        if self.target is not None:
            await world.catch_up(self.target)
        if self.crash is not None:
            await self._crash(world, world.agents[caller], work, key)
        return await super()._once(world, caller, party, work, key)

    async def _crash(self, world: Any, agent: str, work: Any, key: Key) -> None:
        """I13: after a crash in the middle the books are as if nothing had been asked."""
        await world.look(agent)
        before, names = await world.rows(), list(world.escrows)
        with world.crash_at(self.crash or 1):
            await world.ledger.perform(work(world), caller=agent, key=key)
        assert await world.rows() == before
        world.escrows[:] = names

    @initialize(one=terms, other=terms)
    def start(self, one: dict[str, Any], other: dict[str, Any]) -> None:
        """Two worlds with two escrows."""
        super().start()
        self.lock(0, 0, Atomic(8 * USDC.unit), one)
        self.lock(1, 1, Atomic(4 * USDC.unit), other)

    @rule(statement=st.integers(1, 12))
    def crash_next(self, statement: int) -> None:
        """The transaction of the next operation fails at this statement, or at its commit."""
        self.crash = statement

    def act(self, caller: int, party: str, work: Any) -> Answer:
        """Does one operation in both worlds, after a crash in the middle of it if one is due."""
        number = {"buyers": caller, "providers": 2 + caller}.get(party, caller)
        try:
            return super().act(number, "agents", work)
        finally:
            self.crash = self.target = None

    @rule(buyer=picks, provider=picks, amount=locked, terms=terms)
    def lock(self, buyer: int, provider: int, amount: Atomic, terms: dict[str, Any]) -> None:
        """A buyer locks money to release by hand."""
        buyer, provider = buyer % 2, provider % 2

        def work(world: FullWorld) -> Any:
            wish = new_manual(world, provider, amount, terms)

            async def create(tx: Any) -> dict[str, Any]:
                made = await manual.create(tx, world.buyers[buyer], wish)
                world.escrows.append(made["escrow_id"])
                return made

            return create

        if self.act(buyer, "buyers", work).status == 200:
            self.parties[len(self.swept.escrows) - 1] = (buyer, 2 + provider)

    @rule(number=picks, wishes=wishes_of(*PAYS))
    def pay(self, number: int, wishes: list[Wish]) -> None:
        """The buyer pays, in all ways."""
        self.trade(number, wishes)

    @rule(number=picks, wishes=wishes_of(*WORKS))
    def work(self, number: int, wishes: list[Wish]) -> None:
        """The provider delivers, the buyer answers."""
        self.trade(number, wishes)

    @rule(number=picks, wishes=wishes_of(*ARGUES))
    def argue(self, number: int, wishes: list[Wish]) -> None:
        """They dispute, and somebody may decide."""
        self.trade(number, wishes)

    @rule(number=picks, wishes=wishes_of(*OPERATIONS))
    def anything(self, number: int, wishes: list[Wish]) -> None:
        """Whatever there is."""
        self.trade(number, wishes)

    def trade(self, number: int, wishes: list[Wish]) -> None:
        """Things happen to one escrow, one after the other."""
        numbers = sorted(self.parties)
        index = numbers[-1 - number % len(numbers)]
        for turn, wish in enumerate(wishes):
            if turn:
                self.look_between()
            self.do(index, *wish)

    def look_between(self) -> None:
        """Proves the books within a step too."""
        self.books_hold()

    def do(
        self, index: int, what: str, amount: Atomic, part: int, fraction: str, wrong: int
    ) -> None:
        """Somebody, rarely the wrong one, does something with an escrow."""
        role, doing = operations(amount, part, fraction)[what]
        buyer, provider = self.parties[index]
        if what in SIDES and part % 2:
            role = PROVIDER if role == BUYER else BUYER
        who = {BUYER: buyer, PROVIDER: provider, ARBITER: 4, "payee": 6}[role]
        self.target = index if role in (ARBITER, "payee") or wrong < 7 else None
        who = wrong if wrong < 7 else who
        self.act(who, "agents", self._with(index, who, doing))

    @staticmethod
    def _with(index: int, who: int, doing: Any) -> Any:
        return lambda world: lambda tx: doing(tx, world.agents[who], world.escrows[index])

    @precondition(lambda self: self.swept.escrows)
    @rule(buyer=picks, number=picks)
    def close(self, buyer: int, number: int) -> None:
        """The buyer closes, whatever kind it is."""
        self.as_buyer(buyer, number, lambda who, name: lambda tx: close(tx, who, name))

    @rule(sender=st.integers(0, 6), to=st.integers(0, 6), amount=some)
    def transfer(self, sender: int, to: int, amount: Atomic) -> None:
        """Anybody pays anybody, with what it has by then."""

        def work(world: FullWorld) -> Any:
            body = {"to_agent_id": world.agents[to], "amount": display(max(amount, 1))}
            wish = NewTransfer.model_validate(body)
            return lambda tx: transfers.send(tx, world.agents[sender], wish)

        self.act(sender, "agents", work)


class PostgresqlMarket(Market, PostgresqlTrade):
    """The same on PostgreSQL, where a proof is many round trips: one after each step."""

    def look_between(self) -> None:
        return


async def check_actors(world: FullWorld) -> None:
    """What time did has no actor, whoever saw it first."""
    entries = schema.entries.c
    async with reading(world.ledger) as connection:
        query = select(entries.kind, entries.actor).where(entries.kind.in_(TIME_EVENTS))
        found = [tuple(row) for row in await connection.execute(query)]
    assert all(actor is None for kind, actor in found if kind != "deadline")


SHARES = range(10 if LONG else 1)
"""A long run is 2000 runs of 60 steps on each database, in tests that end within the hour."""


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(
    ("machine", "runs", "quick"), [(Market, 200, 3), (PostgresqlMarket, 200, 1)]
)
def test_any_operations_in_any_order(
    machine: type[Market], runs: int, quick: int, share: int
) -> None:
    """I1 to I11, I13, I14, I16, I18, I19: whatever is done, in whatever order, and failing."""
    run_state_machine_as_test(
        machine,
        settings=hypothesis_settings(
            max_examples=runs if LONG else quick,
            stateful_step_count=60 if LONG else 20,
            deadline=None,
        ),
    )

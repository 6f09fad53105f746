"""The ledger under any sequence of operations, on both databases with a moving clock.

Two ledgers do the same things: one is swept after every step, the other never. After every step
the whole books are proven, totals have not fallen, and a refused operation has left every row
identical; at the end both ledgers agree to the unit (I1 to I11, I14, I16, I18, I19).
"""

import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import Table, TextClause, event, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from tests.escrow.market import JOURNAL, RECEIPT_KEY, SESSION_KEY
from tests.support.escrow import ROOT_SEED, MovingClock, empty_books
from tests.support.postgresql import fresh_database
from x402mw.core.amounts import USDC, Atomic
from x402mw.escrow import agents, bodies, books, modes, redemption, schema, sessions
from x402mw.escrow.events.log import find_head
from x402mw.escrow.idempotency import Answer, Key
from x402mw.escrow.ledger import Ledger, open_ledger
from x402mw.escrow.redemption import BadItem, Claim
from x402mw.escrow.rows import fetch_escrows, find_escrow
from x402mw.escrow.rules.values import SESSION, Escrow, agent_account
from x402mw.escrow.settings import Settings
from x402mw.escrow.transactions import Transaction

Work = Callable[[Transaction], Awaitable[dict[str, Any]]]
STEPS = 50
amounts = st.one_of(
    st.integers(0, 12 * USDC.unit), st.sampled_from([0, 1, 99, 100, 101, USDC.unit, 5 * USDC.unit])
).map(Atomic)
picks = st.integers(0, 5)
TOTALS = ("amount", "released", "redeemed", "refunded", "fee", "referral", "change")


@cache
def empty_database() -> Path:
    """A migrated SQLite database to copy, so that examples start fast."""
    path = Path(tempfile.mkdtemp(prefix="x402mw-")) / "empty.db"

    async def make() -> None:
        settings = Settings(str(path), ROOT_SEED)
        await (await open_ledger(settings, MovingClock(), serving=True)).close()

    asyncio.run(make())
    return path


class World:
    """One ledger with its parties. Names are random, so things are known by their number."""

    def __init__(self, url: str, clock: MovingClock) -> None:
        self.url, self.clock = url, clock
        self.ledger: Ledger
        self.buyers: list[str] = []
        self.providers: list[str] = []
        self.escrows: list[str] = []

    async def start(self) -> None:
        """Registers two buyers with money and two providers with journals."""
        self.ledger = await open_ledger(Settings(self.url, ROOT_SEED), self.clock, serving=True)
        if self.ledger._thread is not None:
            for engine in (self.ledger._engine.sync_engine, self.ledger._thread._blocking):
                event.listen(engine, "connect", lambda db, _: db.execute("PRAGMA synchronous=OFF"))
        async with self.ledger.write() as tx:
            for number in range(2):
                buyer = (await agents.register(tx, "buyer"))["agent_id"]
                await agents.deposit(tx, buyer, Atomic(20 * USDC.unit))
                provider = (await agents.register(tx, "provider"))["agent_id"]
                await agents.register_journal(tx, provider, journal(number), RECEIPT_KEY)
                self.buyers.append(buyer)
                self.providers.append(provider)

    async def beat(self) -> None:
        """Keeps the service alive without sweeping."""
        async with self.ledger.write():
            pass

    async def look(self, agent: str) -> None:
        """An agent reads something, which applies its deadlines."""
        await self.ledger.read_of(agent, find_head)

    async def rows(self) -> list[str]:
        """Every row of every table, except the liveness of the service and stored answers."""
        return sorted(await self.ledger.read(_read_everything))

    async def read(self) -> tuple[dict[str, int], list[Escrow]]:
        """All balances and escrows at this moment, once the whole books are proven."""
        return await self.ledger.read(_read_proven)

    @property
    def agents(self) -> list[str]:
        """Everybody, in the same order in every world."""
        return [*self.buyers, *self.providers]

    async def by_number(self) -> dict[str, Any]:
        """Balances and escrows, comparable with another world's."""
        balances, escrows = await self.read()
        states = {escrow.escrow_id: escrow for escrow in escrows}
        return {
            "balances": [balances[agent_account(agent)] for agent in self.agents],
            "house": balances[modes.house("USDC")],
            "escrows": [outcome(states[name]) for name in self.escrows],
        }


async def _read_proven(connection: AsyncConnection) -> tuple[dict[str, int], list[Escrow]]:
    assert await books.check(connection) == []
    accounts = schema.accounts.c
    balances = await connection.execute(select(accounts.account, accounts.balance))
    return dict(map(tuple, balances)), await fetch_escrows(connection, select(schema.escrows))


async def _read_everything(connection: AsyncConnection) -> list[str]:
    """All rows as text, in one statement: a server would be asked thirty times."""
    return list((await connection.execute(_everything(connection.dialect.name))).scalars())


@cache
def _everything(dialect: str) -> TextClause:
    def row(table: Table) -> str:
        if table is schema.service:
            return "entry_seq || '/' || entry_hash || '/' || change_seq"
        if dialect == "postgresql":
            return f"CAST({table.name} AS text)"
        return " || '/' || ".join(f"quote({column})" for column in table.columns)

    tables = [table for table in schema.metadata.sorted_tables if table.name != "idempotency"]
    parts = [f"SELECT '{table.name} ' || {row(table)} FROM {table.name}" for table in tables]
    return text(" UNION ALL ".join(parts))


def outcome(escrow: Escrow) -> tuple[Any, ...]:
    """What two ledgers must agree on for one escrow."""
    return (escrow.status, escrow.close_reason, *(getattr(escrow, name) for name in TOTALS[:6]))


def journal(number: int) -> str:
    """The journal of provider 0 or 1."""
    return JOURNAL[:-1] + str(number)


class Trade(RuleBasedStateMachine):
    """Any operations in any order, in two worlds."""

    new_world = World

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp(prefix="x402mw-"))
        self.clock = MovingClock()
        self.done: list[tuple[int, str, Callable[[World], Work], Key]] = []
        self.totals: dict[str, Escrow] = {}

    def new_database(self, name: str) -> str:
        """A migrated database for one world."""
        return str(shutil.copy(empty_database(), self.folder / name))

    def remove_databases(self) -> None:
        """Deletes what `new_database` made."""
        shutil.rmtree(self.folder)

    def run(self, work: Awaitable[Any]) -> Any:
        """Runs a coroutine on this machine's own loop."""
        return self.runner.run(work)

    @initialize()
    def start(self) -> None:
        """Two worlds from the same empty books."""
        self.worlds = []
        for name in ("swept.db", "lazy.db"):
            self.worlds.append(self.new_world(self.new_database(name), self.clock))
            self.run(self.worlds[-1].start())
        self.swept, self.lazy = self.worlds

    def act(self, caller: int, party: str, work: Callable[[World], Work]) -> Answer:
        """Does one operation in both worlds; they must answer alike."""
        key = Key("", "", f"k{len(self.done)}", "0")
        answers = [self.run(self._once(world, caller, party, work, key)) for world in self.worlds]
        assert answers[0].status == answers[1].status
        self.done.append((caller, party, work, key))
        return answers[0]

    async def _once(
        self, world: World, caller: int, party: str, work: Callable[[World], Work], key: Key
    ) -> Answer:
        agent = getattr(world, party)[caller]
        # What falls due is applied first, so that all that is left to see is the operation itself.
        await world.look(agent)
        before = await world.rows()
        answer = await world.ledger.perform(work(world), caller=agent, key=key)
        if answer.status != 200:
            assert await world.rows() == before, "I10: a refused operation changed something"
        return answer

    def pick(self, number: int) -> int:
        """The number of an escrow that exists."""
        return number % len(self.swept.escrows)

    @rule(buyer=picks, provider=picks, amount=amounts, seconds=st.sampled_from([1800, 3000]))
    def open(self, buyer: int, provider: int, amount: Atomic, seconds: int) -> None:
        """A buyer locks money."""
        buyer, provider = buyer % 2, provider % 2

        def work(world: World) -> Work:
            wish = bodies.NewEscrow.model_construct(
                to_agent_id=world.providers[provider],
                amount=amount,
                session_key=SESSION_KEY,
                journal=journal(provider),
                expires_in_seconds=seconds,
                memo="",
            )

            async def create(tx: Transaction) -> dict[str, Any]:
                made = await sessions.create(tx, world.buyers[buyer], wish)
                world.escrows.append(made["escrow_id"])
                return made

            return create

        self.act(buyer, "buyers", work)

    def as_buyer(self, buyer: int, number: int, operation: Callable[..., Work]) -> None:
        """Runs `operation(agent, escrow_id)` for a buyer who may be the wrong one."""
        index, buyer = self.pick(number), buyer % 2
        self.act(buyer, "buyers", lambda w: operation(w.buyers[buyer], w.escrows[index]))

    @precondition(lambda self: self.swept.escrows)
    @rule(buyer=picks, number=picks, amount=amounts)
    def top_up(self, buyer: int, number: int, amount: Atomic) -> None:
        """More money for a session."""
        amount = Atomic(max(1, amount))
        self.as_buyer(
            buyer, number, lambda who, name: lambda tx: sessions.top_up(tx, who, name, amount)
        )

    @precondition(lambda self: self.swept.escrows)
    @rule(buyer=picks, number=picks)
    def renew(self, buyer: int, number: int) -> None:
        """A fresh token."""
        self.as_buyer(
            buyer, number, lambda who, name: lambda tx: sessions.renew_token(tx, who, name)
        )

    @precondition(lambda self: self.swept.escrows)
    @rule(buyer=picks, number=picks, amount=amounts)
    def release(self, buyer: int, number: int, amount: Atomic) -> None:
        """The buyer pays by hand."""
        self.as_buyer(
            buyer, number, lambda who, name: lambda tx: sessions.release(tx, who, name, amount)
        )

    @precondition(lambda self: self.swept.escrows)
    @rule(buyer=picks, number=picks)
    def close(self, buyer: int, number: int) -> None:
        """The buyer closes."""

        def closing(who: str, name: str) -> Work:
            async def close(tx: Transaction) -> dict[str, Any]:
                return sessions.close_as_buyer(
                    tx, await sessions.as_party(tx.connection, who, name)
                )

            return close

        self.as_buyer(buyer, number, closing)

    @precondition(lambda self: self.swept.escrows)
    @rule(
        provider=picks,
        items=st.lists(
            st.tuples(picks, amounts, st.integers(0, 9).map(lambda n: n == 0)), max_size=4
        ),
    )
    def redeem(self, provider: int, items: list[tuple[int, Atomic, bool]]) -> None:
        """A provider presents what it has, with an item that is no good among it."""
        provider = provider % 2
        batch = bodies.Redemption.model_construct(journal=journal(provider), serial=1, items=[])

        def work(world: World) -> Work:
            async def redeem(tx: Transaction) -> dict[str, Any]:
                judged: list[Claim | BadItem] = [BadItem("malformed", "junk")]
                for number, proven, final in items:
                    name = world.escrows[self.pick(number)]
                    escrow = await find_escrow(tx.connection, name)
                    own = escrow is not None and escrow.provider == world.providers[provider]
                    if escrow is not None and own and escrow.kind == SESSION:
                        judged.append(Claim(name, proven, final))
                return await redemption.redeem(tx, world.providers[provider], batch, judged)

            return redeem

        verdicts = json.loads(self.act(provider, "providers", work).body)["items"]
        assert verdicts[0]["ok"] is False

    @precondition(lambda self: self.done)
    @rule(number=st.integers(0, 1000))
    def replay(self, number: int) -> None:
        """I11: the same key again gives the stored answer and changes nothing at all."""
        caller, party, work, key = self.done[number % len(self.done)]
        for world in self.worlds:
            agent = getattr(world, party)[caller]
            self.run(world.look(agent))
            before = self.run(world.rows())
            answer = self.run(world.ledger.perform(work(world), caller=agent, key=key))
            assert answer.replayed
            assert self.run(world.rows()) == before

    @rule(buyer=picks)
    def faucet(self, buyer: int) -> None:
        """Free money, once."""
        buyer = buyer % 2
        self.act(
            buyer,
            "buyers",
            lambda world: lambda tx: agents.claim_faucet(tx, world.buyers[buyer], ""),
        )

    @rule(seconds=st.sampled_from([1, 55, 290, 650]))
    def live(self, seconds: int) -> None:
        """Time passes while the service runs."""
        while seconds > 0:
            self.clock.advance(min(seconds, STEPS))
            seconds -= STEPS
            for world in self.worlds:
                self.run(world.beat())

    @rule(seconds=st.sampled_from([61, 600, 4000]))
    def outage(self, seconds: int) -> None:
        """Time passes while the service is down."""
        self.clock.advance(seconds)
        for world in self.worlds:
            self.run(world.beat())

    @invariant()
    def books_hold(self) -> None:
        """I1 to I9, I18, I19 in both worlds; I6 against the step before."""
        if not hasattr(self, "swept"):
            return
        self.run(self.swept.ledger.sweep())
        for world in self.worlds:
            for escrow in self.run(world.read())[1]:
                before = self.totals.get(escrow.escrow_id, escrow)
                assert all(getattr(before, name) <= getattr(escrow, name) for name in TOTALS)
                self.totals[escrow.escrow_id] = escrow

    def teardown(self) -> None:
        """I14: once all deadlines have passed, sweeping or not made no difference."""
        if hasattr(self, "swept"):
            self.outage(10_000)
            for _ in range(13):
                self.live(50)
            for world in self.worlds:
                self.run(world.ledger.sweep())
            swept, lazy = (self.run(world.by_number()) for world in self.worlds)
            assert swept == lazy
            assert all(row[0] in ("released", "refunded", "settled") for row in swept["escrows"])
            for world in self.worlds:
                self.run(world.ledger.close())
        self.runner.close()
        self.remove_databases()


class PostgresqlTrade(Trade):
    """The same on PostgreSQL."""

    def __init__(self) -> None:
        super().__init__()
        self.databases = ExitStack()

    def new_database(self, name: str) -> str:
        return self.databases.enter_context(fresh_database(empty_books()))

    def remove_databases(self) -> None:
        super().remove_databases()
        self.databases.close()


LONG = bool(os.environ.get("X402MW_LONG"))
TestTrade, TestTradeOnPostgresql = Trade.TestCase, PostgresqlTrade.TestCase
TestTrade.settings = TestTradeOnPostgresql.settings = hypothesis_settings(
    max_examples=300 if LONG else 4, stateful_step_count=60 if LONG else 25, deadline=None
)

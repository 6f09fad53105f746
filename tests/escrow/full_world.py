"""A ledger with everybody in it, and all that they may try with a manual escrow."""

import hashlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from sqlalchemy import event, select
from sqlalchemy.ext.asyncio import AsyncConnection

from tests.escrow.agreement_steps import check
from tests.escrow.test_machine import World
from tests.support.escrow import reading
from x402mw.core.amounts import Atomic, display
from x402mw.escrow import agents, agreements, deadlines, disputes, manual, schema, sessions
from x402mw.escrow import manual_bodies as bodies
from x402mw.escrow.rows import fetch_escrows, find_escrow
from x402mw.escrow.rules.agreement import Agreement
from x402mw.escrow.rules.table import Event
from x402mw.escrow.rules.values import MANUAL
from x402mw.escrow.transactions import Transaction

OUTCOME = "it has arrived"
BUYER, PROVIDER, ARBITER = "buyer", "provider", "arbiter"
MILESTONES = ("spec", "draft")

Doing = Callable[[Transaction, str, str], Awaitable[dict[str, Any]]]


class Crash(Exception):
    """What ends a transaction in the middle."""


class FullWorld(World):
    """Two buyers and two providers, an arbiter, a referrer, a payee."""

    checked = 0
    """The newest change whose escrow was looked at."""

    async def start(self) -> None:
        """Registers them; the referrer introduced nobody, so that codes name it."""
        await super().start()
        async with self.ledger.write() as tx:
            made = [await agents.register(tx, name) for name in (ARBITER, "referrer", "payee")]
        self.arbiter, self.referrer, self.payee = [str(row["agent_id"]) for row in made]

    @property
    def agents(self) -> list[str]:
        return [*self.buyers, *self.providers, self.arbiter, self.referrer, self.payee]

    async def catch_up(self, index: int) -> None:
        """Does what time has done to one escrow."""
        async with self.ledger.write() as tx:
            await deadlines.apply_to_one(tx, self.escrows[index])

    async def check_agreements(self) -> None:
        """The rows of every manual escrow that has changed are a state that the rules allow."""

        async def load(connection: AsyncConnection) -> list[Agreement]:
            escrows = schema.escrows.c
            new = (escrows.kind == MANUAL) & (escrows.change > self.checked)
            found = await fetch_escrows(connection, select(schema.escrows).where(new))
            return [await agreements.load(connection, escrow) for escrow in found]

        for agreement in await self.ledger.read(load):
            check(agreement)
            self.checked = max(self.checked, agreement.escrow.change)

    async def by_number(self) -> dict[str, Any]:
        """Also what became of parts, carries and disputes, and when each entry counted."""
        async with reading(self.ledger) as connection:
            history = [await _history(connection, name) for name in self.escrows]
        return {**await super().by_number(), "history": history}

    @contextmanager
    def crash_at(self, statement: int, reached: list[str] | None = None) -> Iterator[None]:
        """Within, the n-th statement of a transaction fails, or else its commit; says which."""
        reached = [] if reached is None else reached
        thread = self.ledger._thread
        engine = thread._blocking if thread else self.ledger._engine.sync_engine
        left = statement

        def execute(*_: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                reached.append("statement")
                raise Crash

        def commit(*_: Any) -> None:
            if left > 0:
                reached.append("commit")
                raise Crash

        event.listen(engine, "before_cursor_execute", execute)
        event.listen(engine, "commit", commit)
        try:
            with suppress(Crash):
                yield
        finally:
            event.remove(engine, "before_cursor_execute", execute)
            event.remove(engine, "commit", commit)


async def _history(connection: Any, escrow_id: str) -> list[Any]:
    entries, parts, found = schema.entries.c, schema.parts.c, schema.disputes.c
    queries = (
        select(entries.kind, entries.effective_at)
        .where(entries.escrow_id == escrow_id)
        .order_by(entries.seq),
        select(parts.number, parts.state, parts.proof, parts.review_until)
        .where(parts.escrow_id == escrow_id)
        .order_by(parts.number),
        select(found.number, found.status, found.amount, found.to_provider, found.to_buyer)
        .where(found.escrow_id == escrow_id)
        .order_by(found.number),
        select(schema.agreements.c.carry).where(schema.agreements.c.escrow_id == escrow_id),
    )
    return [[tuple(row) for row in await connection.execute(query)] for query in queries]


def new_manual(world: FullWorld, provider: int, amount: Atomic, terms: dict[str, Any]) -> Any:
    """The body of a lock; `terms` names what it has beside its parties and its amount."""
    body: dict[str, Any] = {
        "to_agent_id": world.providers[provider],
        "amount": display(max(amount, 1)),
        "on_expiry": terms["on_expiry"],
        "expires_in_seconds": terms["seconds"],
        "review_seconds": terms["review"],
    }
    if terms["milestones"]:
        share = display(Atomic(max(1, amount * 2 // 5)))
        body["milestones"] = [{"name": name, "amount": share} for name in MILESTONES]
    if terms["payees"]:
        shares = ((body["to_agent_id"], "0.7"), (world.payee, "0.3"))
        body["payees"] = [{"agent_id": name, "fraction": part} for name, part in shares]
    if terms["referred"]:
        body["referral_code"] = world.referrer
    if terms["condition"]:
        body["condition"] = {"sha256": hashlib.sha256(OUTCOME.encode()).hexdigest()}
    return bodies.NewManual(**body)


def operations(amount: Atomic, part: int, fraction: str) -> dict[str, tuple[str, Doing]]:
    """Everything that can be asked of an escrow, and whose business it is."""
    some, name = display(max(amount, 1)), ([*MILESTONES, None] * 2)[part]
    exact = f"{display(amount)}{fraction}" if amount % 10 else display(max(amount, 1))

    def body(kind: Any, work: Any, **fields: Any) -> Doing:
        return lambda tx, who, escrow_id: work(tx, who, escrow_id, kind(**fields))

    return {
        "release": (BUYER, body(bodies.Pay, manual.release, amount=exact)),
        "up_to": (BUYER, body(bodies.Pay, manual.release, cumulative=exact)),
        "release_all": (BUYER, body(bodies.Pay, manual.release)),
        "milestone": (BUYER, body(bodies.Pay, manual.release, milestone=name)),
        "settle": (BUYER, body(bodies.Settlement, manual.settle, release=some, refund="0.5")),
        "approve": (BUYER, body(bodies.Verdict, manual.approve, milestone=name)),
        "reject": (BUYER, body(bodies.Verdict, manual.reject, milestone=name)),
        "refund": (BUYER, body(bodies.TakeBack, manual.refund, amount=some)),
        "refund_all": (BUYER, body(bodies.TakeBack, manual.refund)),
        "top_up": (BUYER, lambda tx, who, e: manual.top_up(tx, who, e, Atomic(max(1, amount)))),
        "extend": (BUYER, lambda tx, who, e: manual.extend(tx, who, e, 1 + amount % 900)),
        "close": (BUYER, close),
        "deliver": (PROVIDER, body(bodies.Delivery, manual.deliver, milestone=name, proof="x")),
        "give_back": (PROVIDER, body(bodies.TakeBack, manual.refund, amount=some)),
        "return": (
            PROVIDER,
            lambda tx, who, e: manual.give_money_back(tx, who, e, Atomic(max(1, amount))),
        ),
        "provider_close": (PROVIDER, close),
        "dispute": (BUYER, body(bodies.NewDispute, disputes.dispute, amount=some, reason="late")),
        "dispute_part": (
            PROVIDER,
            body(bodies.NewDispute, disputes.dispute, milestone=name, reason="?", evidence="!"),
        ),
        "dispute_all": (PROVIDER, body(bodies.NewDispute, disputes.dispute, reason="all of it")),
        "evidence": (PROVIDER, body(bodies.Evidence, disputes.add_evidence, content="see")),
        "withdraw": (BUYER, disputes.withdraw),
        "resolve": (ARBITER, lambda tx, who, e: _resolve(tx, who, e, part)),
        "condition": ("payee", body(bodies.Outcome, manual.meet_condition, outcome=OUTCOME)),
    }


async def close(tx: Transaction, who: str, escrow_id: str) -> dict[str, Any]:
    """A close by either party, of either kind, as the route does it."""
    escrow = await sessions.as_party(tx.connection, who, escrow_id)
    if escrow.kind == MANUAL:
        return await manual.close(tx, who, escrow)
    if who == escrow.provider:
        return sessions.close_as_provider(tx, escrow, Atomic(0))
    return sessions.close_as_buyer(tx, escrow)


async def _resolve(tx: Transaction, who: str, escrow_id: str, part: int) -> dict[str, Any]:
    """An arbiter gives the provider so many sevenths of what is disputed."""
    escrow = await find_escrow(tx.connection, escrow_id)
    held = escrow.disputed if escrow else Atomic(0)
    paid = Atomic(held * part // 7)
    shares = {"to_provider": display(paid), "to_buyer": display(Atomic(held - paid))}
    return await disputes.resolve(tx, who, escrow_id, bodies.Decision.model_validate(shares))


OPERATIONS = tuple(operations(Atomic(1), 0, ""))
TIME_EVENTS = (Event.REVIEW_END.value, Event.UNDECIDED.value, Event.DEADLINE.value)

"""Whose webhook's turn it is: found at the same cost however much waits, which has a limit."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from tests.escrow.market import Market, market
from tests.escrow.test_webhooks import deliveries, hooked, subscribe, until
from tests.support.escrow import Agent, reading
from tests.support.receiver import receiving
from x402mw.escrow import schema
from x402mw.escrow.events import queue, turns
from x402mw.escrow.events.posting import Outcome
from x402mw.escrow.events.turns import Due, Load

pytestmark = pytest.mark.anyio
HOOKS, SENT = schema.webhooks, schema.deliveries
URL = {"url": "https://receiver.example/"}
IDLE = Load(Counter(), frozenset(), frozenset())


@pytest.fixture
def anyio_backend() -> str:
    """What the escrow runs on."""
    return "asyncio"


async def make_hooks(m: Market, agent: Agent, count: int) -> list[str]:
    """Webhooks of an agent; nothing listens there."""
    made = [await m.post(agent, "/webhooks", URL) for _ in range(count)]
    return [answer.json()["webhook_id"] for answer in made]


async def pile_up(m: Market, hooks: list[str], first: int, count: int) -> None:
    """Makes so many deliveries of each webhook due, of an escrow each."""
    now = m.escrow.ledger.now()
    same = {"event": "locked", "state": "waiting", "part": 0, "attempts": 0, "body": "{}"}
    same |= {"changed_at": now, "next_at": now, "created_at": now}
    rows = [
        {**same, "webhook_id": hook, "seq": seq, "escrow_id": f"esc_{seq}"}
        for hook in hooks
        for seq in range(first, first + count)
    ]

    async def put(db: AsyncConnection) -> None:
        await db.execute(insert(SENT), rows)
        await db.execute(
            update(HOOKS)
            .where(HOOKS.c.webhook_id.in_(hooks))
            .values(next_at=now, waiting=HOOKS.c.waiting + count)
        )

    await m.escrow.ledger.write_aside(put)


async def due(m: Market, load: Load = IDLE) -> Due:
    """What would be sent now."""
    now = m.escrow.ledger.now()
    return await m.escrow.ledger.read(lambda db: turns.find_due(db, now, load))


@pytest.fixture
def _nobody_delivers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves all that is due as it is."""

    async def none(*_: Any) -> Due:
        return Due([], set())

    monkeypatch.setattr(queue, "find_due", none)


@pytest.mark.usefixtures("_nobody_delivers")
async def test_a_round_costs_the_same_however_much_waits(tmp_path: Path) -> None:
    """Cost: the database takes as many steps for a few deliveries that are due as for thousands."""

    async def steps(db: AsyncConnection) -> int:
        taken: list[None] = []
        driver: Any = (await db.get_raw_connection()).driver_connection
        await driver.set_progress_handler(lambda: taken.append(None), 10)
        await turns.find_due(db, now, IDLE)
        await driver.set_progress_handler(None, 0)
        return len(taken)

    async with market(tmp_path) as m:
        now = m.escrow.ledger.now()
        hooks = await make_hooks(m, m.buyer, 20)
        found = []
        for first, last in ((0, 10), (10, 500)):
            await pile_up(m, hooks, first, last - first)
            async with reading(m.escrow.ledger) as db:
                found.append(await steps(db))
        assert 0 < found[1] < found[0] * 1.2


@pytest.mark.usefixtures("_nobody_delivers")
async def test_each_agent_has_its_first_before_anybody_its_second(
    db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fairness: few of each agent, of its webhooks in turn, and who has none on its way first."""
    monkeypatch.setattr(turns, "AT_ONCE", 6)
    async with market(db) as m:
        other = await m.escrow.new_agent("other")
        many = await make_hooks(m, m.buyer, 3)
        await pile_up(m, many, 0, 50)
        (one,) = await make_hooks(m, other, 1)
        await pile_up(m, [one], 0, 5)
        found = await due(m)
        assert [row.agent_id for row in found.rows[:2]] == [m.buyer.agent_id, other.agent_id]
        shares = Counter(row.webhook_id for row in found.rows)
        assert (shares[one], {shares[hook] for hook in many}) == (3, {1})
        # Of the others four are on their way, and there is room for one more.
        keys = {turns.key_of(row) for row in found.rows if row.agent_id == m.buyer.agent_id}
        busy = Load(Counter({m.buyer.agent_id: 3, "ag_x": 2}), keys, frozenset())
        assert [row.webhook_id for row in (await due(m, busy)).rows] == [one]
        full = Load(Counter({m.buyer.agent_id: 4}), keys, frozenset({one}))
        assert (await due(m, full)).rows == []


@pytest.mark.usefixtures("_nobody_delivers")
async def test_who_had_a_turn_goes_behind_the_others(db: str) -> None:
    """Fairness: a webhook with much to tell waits, after each delivery, behind those due before."""
    async with market(db) as m:
        hooks = await make_hooks(m, m.buyer, 2)
        await pile_up(m, hooks, 0, 3)
        (first, *_) = (await due(m)).rows
        await m.escrow.pass_time(5)
        now = m.escrow.ledger.now()
        failed = queue.Done(first, Outcome(delivered=False, text="no"))
        await m.escrow.ledger.write_aside(lambda db: queue.settle(db, [failed], now))
        async with reading(m.escrow.ledger) as connection:
            rows = (await connection.execute(select(HOOKS))).all()
        for row in rows:
            assert row.next_at == (now if row.webhook_id == first.webhook_id else now - 5)
            assert row.waiting == 3
        assert (await due(m)).rows[0].webhook_id != first.webhook_id


async def test_only_so_many_wait(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits: what finds too many waiting is dead at once, is listed, and can be sent again."""
    monkeypatch.setattr(queue, "WAITING_MAX", 2)
    async with hooked(db) as (m, receiver, hook), receiving() as theirs:
        other = await subscribe(m, theirs)
        receiver.behave = lambda _: "fail"

        async def told_other() -> bool:
            found = await deliveries(m, other)
            return [each["state"] for each in found] == ["delivered"] * count

        count = 0
        while count < 4:
            count += 1
            await m.open("1")
            await until(told_other)
        assert len(theirs.got) == 4
        told = await deliveries(m, hook)
        assert [each["state"] for each in told] == ["dead", "dead", "waiting", "waiting"]
        assert {each["outcome"] for each in told[:2]} == {"too many waited"}
        shown = (await m.get(m.buyer, "/webhooks")).json()["items"]
        states = {each["webhook_id"]: each["status"] for each in shown}
        assert states == {hook["webhook_id"]: "failing", other["webhook_id"]: "active"}
        receiver.behave = lambda _: "ok"
        receiver.got.clear()
        path = f"/webhooks/{hook['webhook_id']}/deliveries/{told[0]['event_id']}/redeliver"
        assert (await m.post(m.buyer, path)).status_code == 200
        await m.escrow.pass_time(60)
        await receiver.wait_for(3)

        async def none_waits() -> bool:
            async with reading(m.escrow.ledger) as connection:
                rows = await connection.execute(select(HOOKS.c.waiting, HOOKS.c.next_at))
            return set(map(tuple, rows)) == {(0, None)}

        await until(none_waits)

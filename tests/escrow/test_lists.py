"""Lists of escrows in a state: complete, and not dearer for what has ended."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import delete, event, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from tests.escrow.market import Market, market
from tests.support.escrow import reading
from x402mw.escrow import schema, sessions
from x402mw.escrow.rules.values import ENDED_STATUSES, LIVE_STATUSES

pytestmark = pytest.mark.anyio
MANY, NEWEST = 3000, 10**9


async def close(m: Market, name: str) -> None:
    """Ends a session that paid nothing."""
    assert (await m.post(m.provider, f"/escrow/{name}/close")).is_success


async def listed(m: Market, limit: int, **query: str) -> tuple[list[str], int]:
    """A whole list read page by page, and how many pages it took."""
    found, pages, more = list[str](), 0, dict[str, str]()
    while True:
        answer = await m.get(m.buyer, "/escrow", limit=str(limit), **query, **more)
        page = answer.json()
        assert len(page["items"]) <= limit
        found += [item["escrow_id"] for item in page["items"]]
        pages += 1
        if page["next"] is None:
            return found, pages
        more = {"after": page["next"]}


@asynccontextmanager
async def many_finished(db: str) -> AsyncIterator[Market]:
    """A market whose buyer has had very many escrows like one, which the books do not know."""
    table = schema.escrows
    async with market(db) as m:
        await close(m, model := (await m.open())["escrow_id"])
        query = select(table).where(table.c.escrow_id == model)

        async def fill(connection: AsyncConnection) -> None:
            row = (await connection.execute(query)).one()._asdict()
            rows = [
                {**row, "escrow_id": f"esc_{i:032x}", "opened": NEWEST + i, "change": NEWEST + i}
                for i in range(MANY)
            ]
            await connection.execute(insert(table), rows)
            if connection.dialect.name == "postgresql":
                await connection.exec_driver_sql("ANALYZE escrows")

        await m.escrow.ledger.write_aside(fill)
        yield m
        made = delete(table).where(table.c.opened >= NEWEST)
        await m.escrow.ledger.write_aside(lambda db: db.execute(made))


async def plans(connection: AsyncConnection, caller: str, status: str) -> list[str]:
    """How the database finds a page of escrows in a state: one line for each table it reads."""
    statements: list[tuple[str, Any]] = []

    def hear(_connection: Any, _cursor: Any, statement: str, values: Any, *_: Any) -> None:
        statements.append((statement, values))

    event.listen(connection.sync_connection, "before_cursor_execute", hear)
    await sessions.show_all(connection, caller, role=None, status=status, limit=10, after=None)
    event.remove(connection.sync_connection, "before_cursor_execute", hear)
    explain = "EXPLAIN" if connection.dialect.name == "postgresql" else "EXPLAIN QUERY PLAN"
    found: list[str] = []
    for statement, values in statements:
        plan = await connection.exec_driver_sql(f"{explain} {statement}", values)
        found += [step for step in map(str, plan) if "SEARCH" in step or "SCAN" in step.upper()]
    return found


@pytest.mark.parametrize("status", LIVE_STATUSES)
async def test_what_goes_on_is_found_by_an_index_of_its_own(db: str, status: str) -> None:
    """Cost: a list of live escrows never reads those that have ended, however many."""
    async with many_finished(db) as m, reading(m.escrow.ledger) as connection:
        steps = await plans(connection, m.buyer.agent_id, status)
    assert len(steps) == 4
    assert all("_live" in step for step in steps), steps


async def test_a_page_looks_at_so_many(db: str) -> None:
    """Cost: a list of ended escrows that finds nothing among very many comes to an end by pages."""
    async with many_finished(db) as m:
        assert await listed(m, 10, status="released") == ([], MANY // sessions.LOOKED_AT_MAX + 1)
        found, pages = await listed(m, 500, status="refunded")
        assert len(set(found)) == len(found) == MANY + 1
        assert pages <= MANY // 500 + 2
        assert await listed(m, 10, status="locked") == ([], 1)


@pytest.mark.parametrize("looked_at", [1, 2, 3, 7, 100])
async def test_pages_are_together_the_whole(
    db: str, looked_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists: whatever a page looks at, all pages together are each escrow in its state once."""
    monkeypatch.setattr(sessions, "LOOKED_AT_MAX", looked_at)
    async with market(db) as m:
        await m.escrow.deposit(m.provider.agent_id, "50.00")
        names = list[str]()
        for number in range(12):
            if number % 3:
                names.append((await m.open())["escrow_id"])
                if number % 2:
                    await close(m, names[-1])
                continue
            wish = {"to_agent_id": m.buyer.agent_id, "amount": "1.00"}
            body = (await m.post(m.provider, "/escrow", wish)).json()
            names.append(body["escrow_id"])
            if number % 2:
                await m.post(m.provider, f"/escrow/{names[-1]}/release")
        states = {name: (await m.show(name))["status"] for name in names}
        for status in (*LIVE_STATUSES, *ENDED_STATUSES):
            expected = [name for name in reversed(names) if states[name] == status]
            for limit in (1, 2, 500):
                assert (await listed(m, limit, status=status))[0] == expected
        assert {"locked", "released", "refunded"} == set(states.values())
        assert (await listed(m, 5))[0] == names[::-1]

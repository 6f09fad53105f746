"""I13: the life of a manual escrow, with a failure at every statement of each transaction."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.escrow.full_world import ARBITER, BUYER, PROVIDER, FullWorld, new_manual, operations
from tests.support.escrow import MovingClock, skip_time
from x402mw.core.amounts import USDC, Atomic
from x402mw.escrow import manual
from x402mw.escrow.idempotency import Key

pytestmark = pytest.mark.anyio

TERMS = {
    "on_expiry": "refund",
    "seconds": 300,
    "review": 60,
    "milestones": True,
    "payees": True,
    "referred": True,
    "condition": True,
}
LIFE = (
    *((BUYER, "top_up", 0), (BUYER, "release", 0), (PROVIDER, "deliver", 0)),
    *((BUYER, "reject", 0), (PROVIDER, "deliver", 0), (BUYER, "dispute_part", 0)),
    *((PROVIDER, "evidence", 0), (BUYER, "settle", 0), (BUYER, "withdraw", 0)),
    *((PROVIDER, "give_back", 0), (BUYER, "dispute", 0), (ARBITER, "resolve", 3)),
    *((BUYER, "approve", 0), (PROVIDER, "return", 0), (BUYER, "dispute", 0), (None, "", 90_000)),
    *((BUYER, "withdraw", 0),),
)
"""Who does what; the last number is the part, or for nobody how many seconds pass.

The last withdrawal finds the escrow expired, and ends it in the same transaction.
"""

STATEMENTS_MAX = 60


@asynccontextmanager
async def open_world(db: str) -> AsyncIterator[FullWorld]:
    """A world on a database."""
    world = FullWorld(db, MovingClock())
    await world.start()
    try:
        yield world
    finally:
        await world.ledger.close()


async def survive(world: FullWorld, agent: str, work: Any, key: Key) -> int:
    """Crashes at each statement and at the commit, then does it, then again; counts the crashes."""
    before = await world.rows()
    for statement in range(1, STATEMENTS_MAX):
        names, reached = list(world.escrows), []
        with world.crash_at(statement, reached):
            await world.ledger.perform(work, caller=agent, key=key)
        assert await world.rows() == before
        world.escrows[:] = names
        if reached == ["commit"]:
            break
    else:
        raise AssertionError("no transaction has so many statements")
    answer = await world.ledger.perform(work, caller=agent, key=key)
    assert answer.status == 200, answer.body
    after = await world.rows()
    assert (await world.ledger.perform(work, caller=agent, key=key)).body == answer.body
    assert await world.rows() == after != before
    await world.read()
    await world.check_agreements()
    return statement


async def test_a_crash_anywhere_in_the_life_of_an_escrow_changes_nothing(db: str) -> None:
    """I13, I11: after a failure at any statement or commit the same key has the effect of one."""
    async with open_world(db) as world:
        roles = {BUYER: world.buyers[0], PROVIDER: world.providers[0], ARBITER: world.arbiter}
        wish = new_manual(world, 0, Atomic(8 * USDC.unit), TERMS)

        async def create(tx: Any) -> dict[str, Any]:
            made = await manual.create(tx, roles[BUYER], wish)
            world.escrows.append(made["escrow_id"])
            return made

        crashes = await survive(world, roles[BUYER], create, Key("", "", "create", "0"))
        for number, (role, what, part) in enumerate(LIFE):
            if role is None:
                await skip_time(world.ledger, world.clock, part)
                await world.ledger.sweep()
                continue
            doing = operations(Atomic(123_457), part, "5")[what][1]
            who = roles[role]

            def work(tx: Any, doing: Any = doing, who: str = who) -> Any:
                return doing(tx, who, world.escrows[0])

            crashes += await survive(world, who, work, Key("", "", str(number), "0"))
        (ended,) = (await world.read())[1]
        assert (ended.status, ended.remaining) == ("settled", 0)
        assert crashes > 5 * len(LIFE)

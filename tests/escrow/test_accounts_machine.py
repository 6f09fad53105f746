"""Random lives of agents of both modes: whatever is asked, the books prove right."""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.escrow import ROOT_SEED, MovingClock, reading
from x402mw.core.amounts import Atomic
from x402mw.escrow import access, agents, banking, transfers
from x402mw.escrow.account_bodies import NewTransfer
from x402mw.escrow.books import audit
from x402mw.escrow.ledger import Ledger, open_ledger
from x402mw.escrow.modes import PUBLIC
from x402mw.escrow.settings import Settings
from x402mw.escrow.transactions import Transaction

AGENTS = 6
"""The even ones are live, the odd ones test."""

numbers, amounts = st.integers(0, AGENTS - 1), st.integers(0, 30_000_000)
STEPS = st.one_of(
    st.tuples(st.just("transfer"), numbers, numbers, amounts),
    st.tuples(st.just("deposit"), numbers, st.integers(0, 5), amounts),
    st.tuples(st.just("withdrawal"), numbers, st.integers(0, 5), amounts),
    st.tuples(st.just("faucet"), numbers, st.just(0), st.just(0)),
    st.tuples(st.just("revoke"), numbers, st.just(0), st.integers(0, 9)),
)
Operation = Callable[[Transaction], Awaitable[dict[str, Any]]]


def operation(step: tuple[str, int, int, int], names: list[str]) -> Operation | None:
    """What a step does to the ledger."""
    kind, who, other, amount = step
    name = names[who]
    if kind == "transfer":
        # As if it had been parsed: the form of amounts is tried elsewhere.
        wish = NewTransfer.model_construct(
            to_agent_id=names[other], amount=Atomic(amount + 1), memo=""
        )
        return lambda tx: transfers.send(tx, name, wish)
    if kind == "faucet":
        return lambda tx: agents.claim_faucet(tx, name, "")
    if kind == "revoke":
        return None if amount else lambda tx: access.revoke_agent(tx, name, name)
    return lambda tx: banking.book(tx, "op", kind, name, Atomic(amount), f"line {other}")


async def totals(ledger: Ledger) -> dict[str, int]:
    """The sum of the balances of each asset, and every balance by account."""
    async with reading(ledger) as connection:
        rows = await connection.exec_driver_sql("SELECT account, balance FROM accounts")
        return {row.account: row.balance for row in rows}


async def live(folder: Path, steps: list[tuple[str, int, int, int]]) -> None:
    """Lives through some steps and proves the books."""
    clock = MovingClock()
    database = Settings(str(folder / "e.db"), ROOT_SEED)
    ledger = await open_ledger(database, clock, serving=True)
    try:
        async with ledger.write() as tx:
            tenants = [PUBLIC["live"], PUBLIC["test"]] * (AGENTS // 2)
            made = [await agents.register(tx, "a", tenant=tenant) for tenant in tenants]
        names = [agent["agent_id"] for agent in made]
        lines: set[int] = set()
        for step in steps:
            work = operation(step, names)
            if work is None:
                continue
            before = await totals(ledger)
            answer = await ledger.perform(work, caller=names[step[1]])
            after = await totals(ledger)
            assert answer.status < 500
            check(step, answer.status, before, after, lines, names)
    finally:
        await ledger.close()
    assert await audit(database.database_url) == []


def check(
    step: tuple[str, int, int, int],
    status: int,
    before: dict[str, int],
    after: dict[str, int],
    lines: set[int],
    names: list[str],
) -> None:
    """What one step may have changed."""
    kind, who, other, amount = step
    changed = {name: after[name] - was for name, was in before.items() if after[name] != was}
    if status >= 400:
        assert changed == {}, "a refusal moves nothing"
    elif kind == "transfer":
        assert who % 2 == other % 2, "money never crosses modes"
        wanted = {f"agent:{names[who]}": -amount - 1, f"agent:{names[other]}": amount + 1}
        assert changed == wanted, "and no fee is taken"
    elif kind in ("deposit", "withdrawal"):
        assert other not in lines, "a line of the bank is booked once"
        lines.add(other)
        way = 1 if kind == "deposit" else -1
        world = "world:test" if who % 2 else "world"
        assert changed == {f"agent:{names[who]}": way * amount, world: -way * amount}
    assert all(amount >= 0 for name, amount in after.items() if name[:5] != "world")


@settings(max_examples=40, deadline=None)
@given(st.lists(STEPS, max_size=25))
def test_any_life_of_accounts_keeps_the_books(steps: list[tuple[str, int, int, int]]) -> None:
    """I1 to I3, I10, I18, E25: transfers, bookings, claims and revocations in any order."""
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(live(Path(folder), steps))

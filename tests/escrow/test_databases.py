"""Where databases differ, and what would go wrong if nobody looked: on both, or on one alone."""

import asyncio
import gc
import re
import sqlite3
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from decimal import Decimal
from pathlib import Path

import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import (
    DBAPIError,
    IntegrityError,
    InterfaceError,
    InternalError,
    OperationalError,
)
from sqlalchemy.ext.asyncio import AsyncConnection

import x402mw.escrow
from tests.escrow.market import code_of, market
from tests.support.crowd import open_crowd
from tests.support.escrow import ROOT_SEED, MovingClock, reading
from x402mw.core.amounts import AMOUNT_MAX, Atomic
from x402mw.escrow import agents, database, deadlines, schema, sessions
from x402mw.escrow.books import audit
from x402mw.escrow.ledger import Ledger, open_ledger
from x402mw.escrow.rows import find_escrow
from x402mw.escrow.settings import Settings
from x402mw.escrow.transactions import Transaction

pytestmark = pytest.mark.anyio
STALL_SECONDS_MAX = 0.1


@asynccontextmanager
async def ledger_at(url: str, clock: MovingClock | None = None) -> AsyncIterator[Ledger]:
    """A serving ledger."""
    ledger = await open_ledger(Settings(url, ROOT_SEED), clock or MovingClock(), serving=True)
    try:
        yield ledger
    finally:
        await ledger.close()


async def rows_of(ledger: Ledger) -> dict[str, list[tuple[object, ...]]]:
    """Every row there is."""
    async with reading(ledger) as connection:
        tables = schema.metadata.sorted_tables
        return {
            table.name: sorted(map(tuple, await connection.execute(select(table))))
            for table in tables
        }


# Amounts.

INEXACT = ("9223372036854775807 + 1", "0.5", "1e300", "'x'")
COLUMNS = [
    *(("escrows", name) for name in ("amount", "released", "redeemed", "refunded", "fee")),
    ("accounts", "balance"),
    ("faucet_claims", "amount"),
    ("service", "entry_seq"),
]


async def test_sqlite_never_turns_an_amount_into_a_float(tmp_path: Path) -> None:
    """M1: where SQLite would store a float without a word, the table refuses. SQLite only."""
    async with market(tmp_path) as m:
        await m.open()
        await m.post(m.buyer, "/faucet/claim")
        with closing(sqlite3.connect(tmp_path / "escrow.db", isolation_level=None)) as stranger:
            for table, column in COLUMNS:
                for value in INEXACT:
                    with pytest.raises(sqlite3.IntegrityError):
                        stranger.execute(f"UPDATE {table} SET {column} = {value}")
                kinds = stranger.execute(f"SELECT DISTINCT typeof({column}) FROM {table}")
                assert kinds.fetchall() == [("integer",)]


async def test_a_float_never_reaches_the_database(db: str) -> None:
    """M1: a float in the place of an amount is an error, and moves nothing."""
    async with ledger_at(db) as ledger:
        async with ledger.write() as tx:
            rich = (await agents.register(tx, "rich"))["agent_id"]
        before = await rows_of(ledger)
        with pytest.raises(Exception, match=r".") as refused:
            async with ledger.write() as tx:
                await agents.deposit(tx, rich, 0.5)  # type: ignore[arg-type]
        assert isinstance(refused.value, (DBAPIError, TypeError))
        assert await rows_of(ledger) == before


@pytest.mark.parametrize("amount", [AMOUNT_MAX, 2**63, 2**256])
async def test_what_no_integer_holds_is_one_refusal(db: str, amount: int) -> None:
    """M1 and I10: beyond 2^63-1 both databases give the same refusal, and no row is different."""
    async with ledger_at(db) as ledger:
        crowd = await open_crowd(ledger, 1)
        (name,) = crowd.sessions
        before = await rows_of(ledger)
        answer = await ledger.perform(
            lambda tx: sessions.top_up(tx, crowd.buyer, name, Atomic(amount)), caller=crowd.buyer
        )
        assert (answer.status, '"amount_out_of_range"' in answer.body) == (409, True)
        assert await rows_of(ledger) == before


async def test_sums_are_whole_numbers_again(db: str) -> None:
    """Engines: PostgreSQL adds integers up to a Decimal; what we say of it is a whole number."""
    async with market(db) as m:
        assert (await m.post(m.buyer, "/faucet/claim")).json()["claimed"] == "1.00"
        async with reading(m.escrow.ledger) as connection:
            total = await connection.execute(select(func.sum(schema.faucet_claims.c.amount)))
            given = total.scalar_one()
        assert isinstance(given, Decimal if db.startswith("postgresql") else int)
        answer = await m.post(m.provider, "/faucet/claim")
        assert answer.json() == {"claimed": "1.00", "balance": "1.00"}


# Locks.


def test_no_statement_relies_on_what_sqlite_drops() -> None:
    """Engines: SQLite silently leaves out SKIP LOCKED and has no advisory locks."""
    folder = Path(x402mw.escrow.__file__).parent
    sources = {path.name: path.read_text() for path in folder.rglob("*.py")}
    assert not [name for name, text in sources.items() if re.search("skip_?locked", text, re.I)]
    assert [name for name, text in sources.items() if "with_for_update" in text] == [
        "transactions.py"
    ]
    assert [name for name, text in sources.items() if "advisory" in text] == ["database.py"]


async def test_sqlite_takes_the_lock_when_it_begins(tmp_path: Path) -> None:
    """I12: a writer holds the lock before its first statement; a reader never does. SQLite only."""
    path = tmp_path / "escrow.db"
    async with ledger_at(str(path)) as ledger:
        with closing(sqlite3.connect(path, isolation_level=None, timeout=0)) as stranger:
            async with ledger._engine.begin():
                with pytest.raises(sqlite3.OperationalError, match="locked"):
                    stranger.execute("BEGIN IMMEDIATE")
            async with reading(ledger) as connection:
                await connection.execute(select(schema.service))
                stranger.execute("BEGIN IMMEDIATE")
                stranger.execute("ROLLBACK")


# Damage.


async def test_damage_while_serving_is_a_503(tmp_path: Path) -> None:
    """Failures: a file that breaks under a running service is unavailable. SQLite only."""
    async with market(tmp_path) as m:
        await m.open()
        async with reading(m.escrow.ledger) as connection:
            await connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        path = tmp_path / "escrow.db"
        good = path.read_bytes()
        path.write_bytes(good[:4096] + b"7" * (len(good) - 4096))
        m.escrow.ledger._readers._blocking.dispose()
        assert code_of(await m.get(m.buyer, "/agents/me")) == (503, "unavailable")
        path.write_bytes(good)
        m.escrow.ledger._readers._blocking.dispose()
        assert (await m.get(m.buyer, "/agents/me")).status_code == 200


# Time.


async def test_two_hosts_whose_clocks_disagree(db: str) -> None:
    """T5: hosts with clocks minutes apart are no outage of each other; deadlines still come."""
    slow = MovingClock()
    fast = MovingClock(slow.now + deadlines.SKEW_SECONDS)
    async with ledger_at(db, slow) as one, ledger_at(db, fast) as other:
        crowd = await open_crowd(one, 1, seconds=1800)
        for _ in range(1800 // 50):
            for clock, ledger in ((slow, one), (fast, other)):
                clock.advance(50)
                await ledger.sweep()
        async with reading(one) as connection:
            escrow = await find_escrow(connection, crowd.sessions[0])
    assert escrow is not None
    assert escrow.status == "refunded"


# Speed.


async def test_a_thousand_vouchers_do_not_hold_up_the_loop(
    db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Speed: while a full batch is redeemed no step keeps the event loop for 100 ms of CPU."""
    steps: list[float] = []
    run = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        started = time.thread_time()
        run(handle)
        steps.append(time.thread_time() - started)

    async with ledger_at(db) as ledger:
        crowd = await open_crowd(ledger, 1000)
        batch = crowd.parsed(1000)
        # As the service does: what others left behind is not walked through by the collector.
        gc.collect()
        gc.freeze()
        monkeypatch.setattr(asyncio.Handle, "_run", timed)
        answer = await crowd.redeem(ledger, batch)
        monkeypatch.undo()
        gc.unfreeze()
    assert answer.count('"ok":true') == 1000
    assert max(steps) < STALL_SECONDS_MAX, max(steps)


async def test_what_a_rule_changes_is_written(db: str) -> None:
    """House: after each operation the stored row is the very escrow that the rules made."""
    made = []
    save = Transaction.save

    def noting(tx: Transaction, *arguments: object, **named: object) -> object:
        made.append(save(tx, *arguments, **named))  # type: ignore[arg-type]
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transaction, "save", noting)
        async with market(db) as m:
            name = (await m.open())["escrow_id"]
            for path, body in (("topup", {"amount": "1"}), ("token", None), ("close", None)):
                await m.post(m.buyer, f"/escrow/{name}/{path}", body)
            await m.redeem({"voucher": m.voucher(name, "1"), "amount": "1", "final": True})
            async with reading(m.escrow.ledger) as connection:
                row = (await connection.execute(select(schema.escrows))).one()
    assert len(made) == 5
    assert dict(row._mapping) == made[-1]._asdict()


# The threads that write and read. SQLite only.


async def test_an_operation_that_would_wait_for_others_changes_nothing(tmp_path: Path) -> None:
    """I10: in the writer's thread nothing but the database is waited for; what does is undone."""

    async def work(tx: Transaction) -> dict[str, object]:
        registered = await agents.register(tx, "rich")
        await asyncio.sleep(0)
        return registered

    async with ledger_at(str(tmp_path / "escrow.db")) as ledger:
        before = await rows_of(ledger)
        with pytest.raises(RuntimeError, match="waits"):
            await ledger.perform(work, caller=None)
        assert await rows_of(ledger) == before


async def test_who_gives_up_waiting_leaves_whole_transactions(tmp_path: Path) -> None:
    """I10: a cancelled caller's operation is booked in full, and the next one waits its turn."""

    async def work(tx: Transaction) -> dict[str, object]:
        started.set()
        time.sleep(0.1)  # noqa: ASYNC251 (it blocks the writer's thread on purpose)
        return await agents.register(tx, "first")

    started = threading.Event()
    async with ledger_at(str(tmp_path / "escrow.db")) as ledger:
        cancelled = asyncio.create_task(ledger.perform(work, caller=None))
        await asyncio.to_thread(started.wait, 30)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        second = await ledger.perform(lambda tx: agents.register(tx, "second"), caller=None)
        assert second.status == 200
        assert len((await rows_of(ledger))["agents"]) == 2
        assert await audit(ledger.settings.database_url) == []


async def test_who_reads_never_waits_for_who_writes(tmp_path: Path) -> None:
    """I12: while an operation runs, reads go on, and each of them sees one moment."""

    async def write(tx: Transaction) -> dict[str, object]:
        started.set()
        goes_on.wait(30)
        return await agents.register(tx, "late")

    async def look(connection: AsyncConnection) -> tuple[int, int]:
        before = await connection.execute(count)
        goes_on.set()
        written.wait(30)
        return before.scalar_one(), (await connection.execute(count)).scalar_one()

    started, goes_on, written = threading.Event(), threading.Event(), threading.Event()
    count = select(func.count()).select_from(schema.agents)
    async with ledger_at(str(tmp_path / "escrow.db")) as ledger:
        writing = asyncio.create_task(ledger.perform(write, caller=None))
        writing.add_done_callback(lambda _: written.set())
        await asyncio.to_thread(started.wait, 30)
        assert await ledger.read(look) == (0, 0)
        assert (await writing).status == 200
        assert written.is_set()


async def test_no_read_outlives_its_end(tmp_path: Path) -> None:
    """Engines: however a read ends, it keeps no moment that the log would have to keep for it."""

    async def blocked(connection: AsyncConnection) -> None:
        await connection.execute(select(schema.service))
        started.set()
        goes_on.wait(30)

    async def failed(connection: AsyncConnection) -> None:
        await connection.execute(select(schema.service))
        raise LookupError

    started, goes_on = threading.Event(), threading.Event()
    path = tmp_path / "escrow.db"
    async with ledger_at(str(path)) as ledger:
        reader = asyncio.create_task(ledger.read(blocked))
        await asyncio.to_thread(started.wait, 30)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        with pytest.raises(LookupError):
            await ledger.read(failed)
        await ledger.perform(lambda tx: agents.register(tx, "new"), caller=None)
        with closing(sqlite3.connect(path, timeout=0)) as stranger:
            restart = "PRAGMA wal_checkpoint(RESTART)"
            assert stranger.execute(restart).fetchone()[0] == 1
            goes_on.set()
            stranger.execute("PRAGMA busy_timeout = 30000")
            assert stranger.execute(restart).fetchone()[0] == 0


@pytest.mark.parametrize("kind", [InternalError, InterfaceError, OperationalError])
def test_a_driver_at_a_loss_is_unavailable(kind: type[DBAPIError]) -> None:
    """Whatever a driver calls a server that it lost, the answer is 503 and not 500."""
    assert database.is_unavailable(kind("SELECT 1", {}, Exception("another operation")))
    assert not database.is_unavailable(IntegrityError("SELECT 1", {}, Exception("a row")))

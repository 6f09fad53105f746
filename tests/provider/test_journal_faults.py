"""The journal when something is broken: refuse, leave no trace, and never stop the event loop."""

import asyncio
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import anyio
import pytest

from tests.provider.journals import Clock, admit, admitted, claim, outcome, session_id
from tests.support.payments import QUOTE, SESSION, TOKEN
from x402mw.core.amounts import Atomic
from x402mw.provider.journal import Admitted, Journal, JournalUnavailable, rows, schema
from x402mw.provider.journal import journal as journal_module
from x402mw.provider.journal.store import RowRefused, StoreFailed
from x402mw.provider.journal.transaction import Transaction
from x402mw.provider.journal.writer import Writer

pytestmark = pytest.mark.anyio

LAG_MAX_SECONDS = 0.15
T = TypeVar("T")


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Where the journal is."""
    return str(tmp_path / "journal.db")


@pytest.fixture
def journal(place: str) -> Iterator[Journal]:
    """An open journal."""
    opened = Journal.open(place, clock=Clock())
    yield opened
    opened.close()


@pytest.fixture
def file_journal(path: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    """An open journal in a file, that waits half a second for a lock."""
    monkeypatch.setattr(schema, "BUSY_SECONDS", 0.5)
    opened = Journal.open(path, clock=Clock())
    yield opened
    opened.close()


async def watch_lag(work: Awaitable[T]) -> tuple[T | BaseException, float]:
    """Awaits something, and measures for how long the event loop stood still meanwhile."""
    task = asyncio.ensure_future(work)
    longest, last = 0.0, time.perf_counter()
    while not task.done():
        await asyncio.wait({task}, timeout=0.005)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return task.exception() or task.result(), longest


async def everything(journal: Journal, path: str) -> list[Any]:
    """All rows of all tables that money depends on."""
    await journal.account(SESSION)
    connection = sqlite3.connect(path)
    tables = ("totals", "sessions", "calls", "outcomes", "meters")
    rows = [connection.execute(f"SELECT * FROM {table}").fetchall() for table in tables]
    connection.close()
    return rows


def limit_pages(journal: Journal, more: int) -> None:
    """Fills the disk, but for so many pages."""
    (pages,) = journal._writer._store.connection.execute("PRAGMA page_count").fetchone()
    journal._writer._store.connection.execute(f"PRAGMA max_page_count = {pages + more}")


async def test_full_disk(file_journal: Journal, path: str) -> None:
    """On a full disk nothing is admitted or settled, nothing is half written; later all goes on."""
    call = await admitted(file_journal, claim(1))
    before = await everything(file_journal, path)
    limit_pages(file_journal, 0)
    answers = await asyncio.gather(
        file_journal.settle(call, used=0, outcome=outcome(bytes(16_000))),
        *(admit(file_journal, claim(seq)) for seq in range(2, 300)),
        return_exceptions=True,
    )
    assert any(isinstance(answer, JournalUnavailable) for answer in answers)
    served = [answer for answer in answers if isinstance(answer, Admitted)]
    assert file_journal.unredeemed == 1000 + 1000 * len(served)
    if not served:
        assert await everything(file_journal, path) == before
    limit_pages(file_journal, 1000)
    settled = await file_journal.settle(call, used=0, outcome=outcome(bytes(16_000)))
    assert (settled.charge, settled.charged_total) == (1000, 1000)
    assert await admit(file_journal, claim(1)) == outcome(bytes(16_000))


async def test_a_cancelled_admission_is_freed_when_the_disk_is(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call whose caller went away is voided even if the journal cannot be written just then."""
    monkeypatch.setattr(journal_module, "VOID_RETRY_SECONDS", 0.01)
    commit: Callable[[Writer, Transaction], None] = Writer._commit
    commits = 0

    def second_fails(writer: Writer, transaction: Transaction) -> None:
        nonlocal commits
        commits += 1
        if commits == 2:
            raise StoreFailed("disk full")
        commit(writer, transaction)

    monkeypatch.setattr(Writer, "_commit", second_fails)
    task = asyncio.ensure_future(admit(journal, claim(1)))
    await asyncio.sleep(0)
    task.cancel()
    with anyio.fail_after(5):
        while commits < 3:
            # The journal tries again by itself; there is no event to wait for.
            with anyio.move_on_after(0.005):
                await anyio.sleep_forever()
    account = await journal.account(SESSION)
    assert account is not None
    assert (account.charged, account.reserved) == (0, 0)


async def test_locked_by_a_stranger(file_journal: Journal, path: str) -> None:
    """While another program locks the file nothing is served, and the event loop goes on."""
    before = await everything(file_journal, path)
    stranger = sqlite3.connect(path, isolation_level=None)
    stranger.execute("BEGIN IMMEDIATE")
    answer, lag = await watch_lag(admit(file_journal, claim(1)))
    assert isinstance(answer, JournalUnavailable)
    assert lag < LAG_MAX_SECONDS
    stranger.execute("ROLLBACK")
    stranger.close()
    assert await everything(file_journal, path) == before
    await admitted(file_journal, claim(1))


async def test_a_slow_disk_does_not_stop_the_loop(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a commit takes its time the event loop goes on, and what gathers is one batch."""
    commit: Callable[[Writer, Transaction], None] = Writer._commit

    def slowly(writer: Writer, transaction: Transaction) -> None:
        time.sleep(0.3)
        commit(writer, transaction)

    monkeypatch.setattr(Writer, "_commit", slowly)
    before = journal.serial
    work = asyncio.gather(*(admitted(journal, claim(seq)) for seq in range(100)))
    answer, lag = await watch_lag(work)
    assert isinstance(answer, list)
    assert lag < LAG_MAX_SECONDS
    assert journal.serial - before <= 3


async def test_one_bad_operation_hurts_no_other(journal: Journal) -> None:
    """A batch with operations that fail, in code or at a check of the file, keeps all others."""

    def wrong(transaction: Transaction) -> None:
        transaction.put_session(_session(transaction, reserved=Atomic(5)))
        raise ZeroDivisionError

    def impossible(transaction: Transaction) -> None:
        transaction.put_session(_session(transaction, charged=Atomic(10**15)))

    await admitted(journal, claim(1))
    good = [admitted(journal, claim(seq)) for seq in range(2, 50)]
    bad = [journal._do(wrong), journal._do(impossible)]
    answers = await asyncio.gather(*good[:20], *bad, *good[20:], return_exceptions=True)
    failed = [answer for answer in answers if isinstance(answer, Exception)]
    assert [type(error) for error in failed] == [ZeroDivisionError, RowRefused]
    account = await journal.account(SESSION)
    assert account is not None
    assert (account.charged, account.reserved) == (0, 49_000)
    assert journal.unredeemed == 49_000


def _session(transaction: Transaction, **changes: Atomic) -> Any:
    row = transaction.session(SESSION)
    assert row is not None
    return row._replace(account=replace(row.account, **changes))


PITFALLS = [
    pytest.param("charged", 4.5, id="a fraction"),
    pytest.param("charged", 2**63, id="more than 64 bits"),
    pytest.param("best", 2**63, id="more than 64 bits again"),
    pytest.param("sent", -1, id="below zero"),
    pytest.param("charged", Decimal("4.5"), id="a decimal"),
]


@pytest.mark.parametrize(("field", "value"), PITFALLS)
async def test_what_is_no_integer_of_64_bits(journal: Journal, field: str, value: Any) -> None:
    """Both databases refuse the same values with the same error, and nothing becomes a float."""

    def put(transaction: Transaction) -> None:
        row = transaction.session(SESSION)
        assert row is not None
        account = {} if field == "sent" else {field: value}
        other = {field: value} if field == "sent" else {}
        row = row._replace(account=replace(row.account, **account), **other)
        transaction.put_session(row)

    await admitted(journal, claim(1))
    with pytest.raises(RowRefused):
        await journal._do(put)
    account = await journal.account(SESSION)
    assert account is not None
    assert (account.charged, account.reserved) == (0, 1000)


async def test_totals_beyond_64_bits(journal: Journal) -> None:
    """What all sessions owe together is refused when it no longer fits, and no session is half."""
    rich = replace(TOKEN, deposit=Atomic(2**62))
    dear = replace(QUOTE, amount=Atomic(2**62))
    for number in (1, 2):
        what = claim(1, session=session_id(number), token=rich, terms=dear, cumulative=2**62)
        if number == 1:
            await admitted(journal, what)
        else:
            with pytest.raises(RowRefused):
                await admit(journal, what)
    assert await journal.account(session_id(2)) is None
    assert journal.unredeemed == 2**62


async def test_sums_are_integers(journal: Journal, place: str) -> None:
    """The sums that the totals are compared with are integers, also where sums are decimals."""
    await journal.settle(await admitted(journal, claim(1)), used=0, outcome=outcome())
    (sums,) = await journal._do(lambda transaction: transaction.select(rows.READ_SUMS))
    assert [type(number) for number in sums] == [int] * 4
    assert sums[0] == 1000


async def test_waiting_operations_are_committed_by_close(place: str) -> None:
    """`close` first commits whatever was asked before it."""
    journal = Journal.open(place, clock=Clock())
    waiting = [asyncio.ensure_future(admit(journal, claim(seq))) for seq in range(50)]
    await asyncio.sleep(0)
    journal.close()
    assert all(isinstance(call, Admitted) for call in await asyncio.gather(*waiting))


def test_a_loop_that_ended_harms_nobody(place: str) -> None:
    """When an event loop is gone, what it asked is still committed and others are still served."""
    journal = Journal.open(place, clock=Clock())

    async def leave() -> None:
        journal._writer.submit(lambda transaction: time.sleep(0.2))
        task = asyncio.ensure_future(admit(journal, claim(1)))
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(leave())

    async def come() -> None:
        call = await journal.lookup(SESSION, 1)
        assert call is not None
        await admitted(journal, claim(2))

    asyncio.run(come())
    journal.close()


@pytest.mark.parametrize(("durability", "synchronous"), [("fsync", 2), ("process", 1)])
def test_durability(path: str, durability: Any, synchronous: int) -> None:
    """By default a commit is on the disk before it is acknowledged (SQLite FULL, in WAL mode)."""
    journal = Journal.open(path, durability=durability)
    assert journal._writer._store.connection.execute("PRAGMA synchronous").fetchone() == (
        synchronous,
    )
    assert journal._writer._store.connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    journal.close()

"""The journal in PostgreSQL when connections are lost: the truth, or nothing served."""

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import asyncpg
import pytest

from tests.provider.journals import Clock, admit, admitted, claim
from tests.provider.places import execute
from tests.support.payments import SESSION
from x402mw.core.errors import ConfigurationError
from x402mw.core.gate import CallState
from x402mw.provider.journal import Journal, JournalUnavailable, connections, postgresql, writer
from x402mw.provider.journal.connections import Line, schema_of
from x402mw.provider.journal.postgresql import PostgresqlStore
from x402mw.provider.journal.writer import Writer

pytestmark = pytest.mark.anyio


@pytest.fixture
def place(server_place: str) -> str:
    """A place for a journal in PostgreSQL."""
    return server_place


@pytest.fixture
def journal(place: str) -> Iterator[Journal]:
    """An open journal."""
    opened = Journal.open(place, clock=Clock())
    yield opened
    opened.close()


def store_of(journal: Journal) -> PostgresqlStore:
    """The insides of a journal."""
    store = journal._writer._store
    assert isinstance(store, PostgresqlStore)
    return store


def cut(place: str, kind: str = "") -> None:
    """Cuts a journal's connections, as an operator or a failover does."""
    execute(
        place,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        f" WHERE application_name LIKE 'x402mw-journal-{kind}%' AND pid <> pg_backend_pid()"
        " AND datname = current_database()",
    )


@pytest.mark.parametrize("kind", ["book", "life", ""])
async def test_a_lost_connection_is_made_again(journal: Journal, place: str, kind: str) -> None:
    """Cut connections cost nobody anything; the worker keeps its number and its open calls."""
    call = await admitted(journal, claim(1))
    before = store_of(journal).worker
    cut(place, kind)
    await admitted(journal, claim(2))
    assert store_of(journal).worker == before
    assert (await journal.settle(call, used=0, outcome=None)).charge == 1000
    assert await journal.lookup(SESSION, 2) is not None


def lose_commit(monkeypatch: pytest.MonkeyPatch, *, arrives: bool) -> None:
    """Has the next COMMIT lose its connection, before or after the server carries it out."""
    run = Line.execute
    commits = 0

    async def lossy(line: Line, statements: str) -> None:
        nonlocal commits
        commits += statements == "COMMIT"
        if statements != "COMMIT" or commits > 1:
            await run(line, statements)
            return
        if arrives:
            await run(line, statements)
        line.drop()
        raise asyncpg.ConnectionDoesNotExistError("cut")

    monkeypatch.setattr(Line, "execute", lossy)


async def test_a_commit_that_arrived_counts(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the connection is lost after a COMMIT was carried out, its callers hear that it was."""
    lose_commit(monkeypatch, arrives=True)
    call = await admitted(journal, claim(1))
    assert (await journal.settle(call, used=0, outcome=None)).charged_total == 1000


async def test_a_commit_that_did_not_arrive_does_not_count(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the connection is lost before the COMMIT arrived, nothing was written; trying again is."""
    lose_commit(monkeypatch, arrives=False)
    with pytest.raises(JournalUnavailable):
        await admit(journal, claim(1))
    assert await journal.lookup(SESSION, 1) is None
    await admitted(journal, claim(1))


@pytest.mark.parametrize("arrives", [True, False])
async def test_a_commit_in_doubt_is_made_up_for(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, arrives: bool
) -> None:
    """While nobody can tell, nothing is served; a call that was admitted after all is voided."""
    monkeypatch.setattr(writer, "DOUBT_SECONDS", 0.0)
    lose_commit(monkeypatch, arrives=arrives)
    asked = 0
    committed = PostgresqlStore.committed

    def silent(store: PostgresqlStore, ticket: str) -> bool:
        nonlocal asked
        asked += 1
        if asked < 3:
            raise OSError("the server is away")
        return committed(store, ticket)

    monkeypatch.setattr(PostgresqlStore, "committed", silent)
    with pytest.raises(JournalUnavailable):
        await admit(journal, claim(1))
    with pytest.raises(JournalUnavailable):
        await admit(journal, claim(2))
    await admitted(journal, claim(2))
    if arrives:
        found = await journal.lookup(SESSION, 1)
        while found is not None and found.state is not CallState.SETTLED:
            found = await journal.lookup(SESSION, 1)
        assert found is not None
        assert found.charge == 0
    else:
        assert await journal.lookup(SESSION, 1) is None
    account = await journal.account(SESSION)
    assert account is not None
    assert (account.charged, account.reserved) == (0, 1000)


@pytest.mark.parametrize(
    "error", [asyncpg.SerializationError("busy"), asyncpg.DeadlockDetectedError("stuck")]
)
async def test_conflicts_are_tried_again(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A batch that the server took back for another's sake (40001, 40P01) is tried again."""
    commit: Callable[..., None] = Writer._commit
    errors = [error, error]

    def contested(self: Writer, transaction: Any) -> None:
        if errors:
            raise errors.pop()
        commit(self, transaction)

    monkeypatch.setattr(Writer, "_commit", contested)
    await asyncio.gather(*(admitted(journal, claim(seq)) for seq in range(10)))
    assert journal.unredeemed == 10_000


async def test_waiting_for_the_row_is_bounded(journal: Journal, place: str) -> None:
    """While somebody else keeps the totals locked nothing is served, and the event loop goes on."""
    stranger = await asyncpg.connect(place, server_settings={"search_path": schema_of(place)})
    transaction = stranger.transaction()
    await transaction.start()
    await stranger.execute("SELECT * FROM totals FOR UPDATE")
    asked = time.monotonic()
    with pytest.raises(JournalUnavailable):
        await admit(journal, claim(1))
    assert time.monotonic() - asked < connections.LOCK_MS / 1000 + 3
    await transaction.rollback()
    await stranger.close()
    await admitted(journal, claim(1))


async def test_a_number_counts_as_free_only_after_a_while(
    journal: Journal, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls of a worker whose connection is gone are settled after several rounds only."""
    monkeypatch.setattr(postgresql, "FREE_ROUNDS", 3)
    other = Journal.open(place, clock=Clock())
    await admitted(other, claim(1))
    # As the server sees it when a host dies; the worker itself does not notice yet.
    execute(
        place,
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
        f" WHERE application_name = '{store_of(other)._life._name}'",
    )
    for expected in (CallState.OPEN, CallState.OPEN, CallState.SETTLED):
        # Its thread looks for dead workers before it takes up the next operation.
        journal._writer._round_at = 0
        await journal.account(SESSION)
        found = await journal.lookup(SESSION, 1)
        assert found is not None
        assert found.state is expected
    other.close()


async def test_a_worker_that_was_away_too_long_takes_a_new_number(
    journal: Journal, place: str
) -> None:
    """If another worker has its number by then, a worker that comes back takes a free one."""
    store = store_of(journal)
    thief = await asyncpg.connect(place)
    cut(place, "life")
    before = store.worker
    await thief.execute(f"SELECT pg_advisory_lock({store._locks._journal}, {before})")
    await admitted(journal, claim(1))
    assert store.worker != before
    await thief.close()


def test_workers_that_start_at_once(place: str) -> None:
    """Several hosts that start on an empty database at the same time make one journal."""
    with ThreadPoolExecutor(6) as threads:
        journals = list(threads.map(lambda _: Journal.open(place, clock=Clock()), range(6)))
    assert len({journal.journal_id for journal in journals}) == 1
    assert sorted(store_of(journal).worker for journal in journals) == list(range(6))
    assert [journal.leads for journal in journals].count(True) == 1
    for journal in journals:
        journal.close()


async def test_two_journals_in_one_database(place: str) -> None:
    """Journals in schemas of their own know nothing of each other."""
    first, second = Journal.open(place), Journal.open(f"{place}_too")
    assert first.journal_id != second.journal_id
    assert first.leads
    assert second.leads
    first.close()
    second.close()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://nobody@127.0.0.1:1/none",
        "postgresql://127.0.0.1:1/none?search_path=a,b",
        "postgresql://127.0.0.1:1/none?search_path=A",
    ],
)
def test_unusable_servers(url: str) -> None:
    """A server that is not there, or a schema that is no name, is told at once."""
    with pytest.raises(ConfigurationError):
        Journal.open(url)


def test_another_version_is_left_alone(place: str) -> None:
    """Tables of another version are refused and not touched."""
    Journal.open(place).close()
    execute(place, "UPDATE settings SET value = '99' WHERE key = 'schema_version'")
    with pytest.raises(ConfigurationError, match="version"):
        Journal.open(place)


@pytest.mark.parametrize(("durability", "commit"), [("fsync", "on"), ("process", "off")])
def test_durability(place: str, durability: Any, commit: str) -> None:
    """By default the server has a commit on its disk before it is acknowledged."""
    journal = Journal.open(place, durability=durability)
    names = store_of(journal)._book._settings
    assert names["synchronous_commit"] == commit
    journal.close()


def test_without_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without asyncpg the error says what to install."""
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    monkeypatch.delitem(sys.modules, "x402mw.provider.journal.postgresql")
    with pytest.raises(ConfigurationError, match="x402mw\\[postgres\\]"):
        Journal.open("postgresql://127.0.0.1/none")

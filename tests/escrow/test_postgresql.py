"""What can only happen on PostgreSQL: lost connections, conflicts, its death, several services."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

import asyncpg
import httpx
import pytest
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from tests.escrow.market import Market, code_of, joined, market
from tests.support.escrow import ROOT_SEED, EscrowProcess, MovingClock, reading
from tests.support.postgresql import Server, database_name, shared_server, start_server
from x402mw.escrow import agents, database, idempotency
from x402mw.escrow.books import audit
from x402mw.escrow.ledger import ATTEMPTS_MAX, Ledger, open_ledger
from x402mw.escrow.settings import Settings
from x402mw.escrow.transactions import Transaction

pytestmark = pytest.mark.anyio
LONG = bool(os.environ.get("X402MW_LONG"))
KILLS = 12 if LONG else 2
PAUSE_SECONDS = 0.1
"""Shorter ones would mostly keep both cores busy with asking a server that is not there."""


@asynccontextmanager
async def ledger_at(url: str) -> AsyncIterator[Ledger]:
    """A serving ledger."""
    ledger = await open_ledger(Settings(url, ROOT_SEED), MovingClock(), serving=True)
    try:
        yield ledger
    finally:
        await ledger.close()


async def insist(m: Market, path: str, body: dict[str, str], key: str) -> dict[str, Any]:
    """Sends a request again and again, with one key, until it has an answer that counts."""
    while True:
        try:
            answer = await m.post(m.buyer, path, body, key=key)
        except httpx.TransportError:
            await asyncio.sleep(PAUSE_SECONDS)
            continue
        if answer.status_code == 200:
            return dict(answer.json())
        assert answer.status_code in (409, 503), answer.text
        await asyncio.sleep(PAUSE_SECONDS)


async def top_up_through(m: Market, count: int, trouble: Any) -> list[str]:
    """Many top-ups of a cent while there is trouble; the deposits that they were answered with."""
    name = (await m.open("5.00"))["escrow_id"]
    path, body = f"/escrow/{name}/topup", {"amount": "0.01"}
    work = (insist(m, path, body, f"k{number}") for number in range(count))
    answers = (await asyncio.gather(trouble, *work))[1:]
    again = await asyncio.gather(*(insist(m, path, body, f"k{number}") for number in range(count)))
    assert [answer["amount"] for answer in again] == [answer["amount"] for answer in answers]
    assert Decimal((await m.show(name))["amount"]) == 5 + Decimal(count) / 100
    return [answer["amount"] for answer in answers]


# Lost connections, and the death of the server.


async def test_a_lost_connection_is_a_503(postgresql: str) -> None:
    """Failures: when the server drops us in mid-request the same key works on retry, once."""

    async def drop() -> None:
        for _ in range(20):
            await asyncio.to_thread(shared_server().drop_connections, postgresql)

    async with market(postgresql) as m:
        assert len(set(await top_up_through(m, 100, drop()))) == 100


@pytest.fixture
def mortal() -> Iterator[Server]:
    """A durable server of one's own, to kill."""
    server = start_server()
    yield server
    server.remove()


async def test_a_killed_database_loses_nothing_it_had_acknowledged(mortal: Server) -> None:
    """I13: SIGKILL of the server among commits; what was answered stands, what is repeated is one.

    A commit whose answer was lost may or may not have happened; the same key finds out.
    """

    def kill() -> None:
        for _ in range(KILLS):
            # As long as all need to have asked again, so that it dies among commits.
            time.sleep(PAUSE_SECONDS)
            mortal.kill()
            mortal.start()

    async with market(mortal.new_database()) as m:
        answers = await top_up_through(m, 100, asyncio.to_thread(kill))
        assert len(set(answers)) == 100, "each top-up happened once, so each saw its own deposit"


async def test_a_commit_whose_answer_is_lost(
    postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I13: the connection dies once COMMIT was carried out; the retry has the first answer."""
    async with market(postgresql) as m:
        name = (await m.open("5.00"))["escrow_id"]
        path, body = f"/escrow/{name}/topup", {"amount": "1"}
        store = idempotency.store

        async def store_and_die(tx: Transaction, *arguments: Any) -> None:
            await store(tx, *arguments)
            await tx.flush()
            await _commit_behind(tx.connection)

        monkeypatch.setattr(idempotency, "store", store_and_die)
        assert code_of(await m.post(m.buyer, path, body, key="k")) == (503, "unavailable")
        monkeypatch.undo()
        again = await m.post(m.buyer, path, body, key="k")
        assert (again.json()["amount"], again.headers["idempotent-replayed"]) == ("6.00", "true")
        assert (await m.show(name))["amount"] == "6.00"


async def _commit_behind(connection: AsyncConnection) -> None:
    """Commits on the very connection, and cuts it before anyone hears of it."""
    driver = (await connection.get_raw_connection()).driver_connection
    assert driver is not None
    await driver.execute("COMMIT")
    driver.terminate()


# Conflicts.


async def test_a_deadlock_is_run_again(postgresql: str) -> None:
    """Engines: the victim of a real deadlock (40P01) runs once more, and nothing happens twice."""
    server, name = shared_server(), database_name(postgresql)
    server.execute(f"ALTER DATABASE {name} SET deadlock_timeout = '50ms'")
    stranger = await asyncpg.connect(postgresql)
    await stranger.execute("SET deadlock_timeout = '60s'")
    lock = "UPDATE accounts SET balance = balance WHERE account = "
    attempts, waiting, again = [], [], asyncio.Event()
    async with ledger_at(postgresql) as ledger:
        async with ledger.write() as tx:
            rich = (await agents.register(tx, "rich"))["agent_id"]

        async def work(tx: Transaction) -> dict[str, Any]:
            attempts.append(1)
            if len(attempts) > 1:
                again.set()
            else:
                await stranger.execute("BEGIN")
                await stranger.execute(lock + "'faucet'")
                await tx.connection.exec_driver_sql(lock + "'world'")
                blocked = asyncio.create_task(stranger.execute(lock + "'world'"))
                await _until_blocked(server, name)
                waiting.append(blocked)
                await tx.connection.exec_driver_sql(lock + "'faucet'")
            return await agents.claim_faucet(tx, rich, "")

        answering = asyncio.create_task(ledger.perform(work, caller=rich))
        await asyncio.wait_for(again.wait(), 30)
        await waiting[0]
        await stranger.execute("ROLLBACK")
        answer = await answering
        await stranger.close()
    assert (answer.status, len(attempts)) == (200, 2)
    assert '"balance":"1.00"' in answer.body


async def _until_blocked(server: Server, name: str) -> None:
    query = f"SELECT 1 FROM pg_stat_activity WHERE datname = '{name}' AND wait_event_type = 'Lock'"
    for _ in range(1000):
        if await asyncio.to_thread(server.execute, query):
            return


@pytest.mark.parametrize(("failures", "attempts"), [(2, 3), (9, ATTEMPTS_MAX)])
async def test_a_serialization_failure_is_run_again(
    postgresql: str, failures: int, attempts: int
) -> None:
    """Engines: 40001 runs again a few times, then it is "unavailable", and nothing has changed."""
    made = []
    fail = "DO $$ BEGIN RAISE EXCEPTION 'as if' USING ERRCODE = '40001'; END $$"
    async with ledger_at(postgresql) as ledger:

        async def work(tx: Transaction) -> dict[str, Any]:
            made.append(await agents.register(tx, "twin"))
            if len(made) <= failures:
                await tx.connection.exec_driver_sql(fail)
            return made[-1]

        try:
            await ledger.perform(work, caller=None)
        except DBAPIError as error:
            assert database.is_unavailable(error)
        async with reading(ledger) as connection:
            count = await connection.exec_driver_sql("SELECT count(*) FROM agents")
            assert count.scalar_one() == (1 if attempts > failures else 0)
    assert len(made) == attempts


# Several services.


async def test_two_services_start_at_once_on_an_empty_database(postgresql: str) -> None:
    """I12: two processes make one schema and one set of books, and serve it together."""
    both = [EscrowProcess(postgresql), EscrowProcess(postgresql)]
    try:
        await asyncio.gather(*(asyncio.to_thread(process.start) for process in both))
        async with joined(both[0]) as m:
            name = (await m.open())["escrow_id"]
            m.http.base_url = f"{both[1].url}/api/v1"
            assert (await m.show(name))["status"] == "locked"
        both[1].check()
        assert [process.terminate() for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()


async def test_services_behind_one_database_die_in_turn(postgresql: str) -> None:
    """I12 and I13: three services, killed one after the other; one chain, nothing twice or lost."""
    services = [EscrowProcess(postgresql) for _ in range(3)]
    try:
        await asyncio.gather(*(asyncio.to_thread(service.start) for service in services))

        def kill_in_turn() -> None:
            for number in range(KILLS):
                services[number % 3].kill()
                services[number % 3].start()

        async with joined(services[0]) as m:
            turn = iter(range(10**9))
            post = m.http.post

            async def anywhere(path: str, **request: Any) -> httpx.Response:
                url = services[next(turn) % 3].url
                return await post(f"{url}/api/v1{path}", **request)

            m.http.post = anywhere  # type: ignore[method-assign]
            answers = await top_up_through(m, 100, asyncio.to_thread(kill_in_turn))
            assert len(set(answers)) == 100
        assert await audit(postgresql) == []
    finally:
        for service in services:
            service.kill()

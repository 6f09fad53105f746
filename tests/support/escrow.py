"""Real escrows for tests: one in this process on a real socket, or one in a process of its own."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection

from tests.support.postgresql import database_name, shared_server
from x402mw.core.amounts import to_atomic
from x402mw.core.keys import public_key
from x402mw.core.strict import b64url_encode
from x402mw.escrow import agents, database, schema
from x402mw.escrow.app import create_app, say_farewell
from x402mw.escrow.books import audit
from x402mw.escrow.ledger import Ledger, open_ledger
from x402mw.escrow.serve import AnnouncingServer, bind, url_of
from x402mw.escrow.settings import Settings

ROOT_SEED = bytes(range(32))
SESSION_SEED, RECEIPT_SEED = b"s" * 32, b"r" * 32
SESSION_KEY = b64url_encode(public_key(SESSION_SEED))
RECEIPT_KEY = b64url_encode(public_key(RECEIPT_SEED))
START = 1_800_000_000.0
HEARTBEAT_STEP = 50


def database_in(place: Path | str) -> str:
    """The database that a test means: a file in a folder, or a URL as it stands."""
    return place if isinstance(place, str) else str(place / "escrow.db")


class MovingClock:
    """A clock that moves only when told to. Seconds since the epoch."""

    def __init__(self, now: float = START) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Moves on. An escrow on this clock sees a jump over 60 s as an outage of its own."""
        self.now += seconds


def reading(ledger: Ledger) -> AbstractAsyncContextManager[AsyncConnection]:
    """A connection that sees one moment, for as long as a test looks around in it."""
    return database.reading(ledger._engine)


@cache
def empty_books() -> str:
    """The name of a PostgreSQL database with our tables in it, to copy: quicker than migrating."""
    url = shared_server().new_database()

    async def make() -> None:
        await (await open_ledger(Settings(url, ROOT_SEED), MovingClock(), serving=False)).close()

    asyncio.run(make())
    return database_name(url)


@dataclass
class Agent:
    """A registered agent and its API key."""

    agent_id: str
    api_key: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"}


@dataclass
class RunningEscrow:
    """An escrow served in this process, on a real socket."""

    url: str
    ledger: Ledger
    settings: Settings
    clock: Callable[[], float]
    app: Any = None

    @property
    def root_key(self) -> str:
        """The public root key, base64url."""
        return b64url_encode(public_key(self.settings.root_seed))

    async def new_agent(self, name: str = "agent", *, balance: str = "0") -> Agent:
        """Registers an agent over HTTP and books money for it."""
        async with httpx.AsyncClient(base_url=self.url, timeout=30, verify=False) as http:
            answer = await http.post("/api/v1/agents", json={"name": name})
            answer.raise_for_status()
        agent = Agent(answer.json()["agent_id"], answer.json()["api_key"])
        if balance != "0":
            await self.deposit(agent.agent_id, balance)
        return agent

    async def deposit(self, agent_id: str, amount: str) -> None:
        """Books money as the operator does."""
        async with self.ledger.write() as tx:
            await agents.deposit(tx, agent_id, to_atomic(amount))

    async def pass_time(self, seconds: float) -> None:
        """Moves a `MovingClock` on while the service stays alive (heartbeats all the way)."""
        assert isinstance(self.clock, MovingClock)
        while seconds > 0:
            self.clock.advance(min(seconds, HEARTBEAT_STEP))
            seconds -= HEARTBEAT_STEP
            await self.ledger.sweep()

    async def skip_time(self, seconds: float) -> None:
        """Moves a `MovingClock` on at once, as if the service had been alive and nobody looked."""
        assert isinstance(self.clock, MovingClock)
        await skip_time(self.ledger, self.clock, seconds)

    async def check(self) -> list[str]:
        """Every violated invariant of the books."""
        return await audit(self.settings.database_url)


async def skip_time(ledger: Ledger, clock: MovingClock, seconds: float) -> None:
    """Moves a clock on, and the heartbeat with it: nothing looks like an outage."""
    clock.advance(seconds)
    async with ledger._engine.begin() as connection:
        await connection.execute(update(schema.service).values(heartbeat=int(clock())))


@asynccontextmanager
async def running_escrow(
    place: Path | str, clock: Callable[[], float] | None = None, **changes: Any
) -> AsyncIterator[RunningEscrow]:
    """Serves an escrow on a free port of this machine; `changes` are fields of `Settings`.

    `place` is a folder for a SQLite file, or the URL of a database. Without a `clock` it is a
    `MovingClock` that stands still; pass `time.time` for real time.
    At the end the books must balance.
    """
    settings = replace(Settings(database_in(place), ROOT_SEED), **changes)
    clock = clock or MovingClock()
    app = create_app(settings, clock=clock)
    sock = bind("127.0.0.1", 0)
    server = AnnouncingServer(app, lambda: None, farewell=lambda: say_farewell(app))
    # The steps of `server.serve` without its signal handlers and its waiting loop.
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    await server.startup([sock])
    assert server.started, "the escrow did not start"
    try:
        escrow = RunningEscrow(url_of(sock), app.state.ledger, settings, clock, app)
        yield escrow
        assert await escrow.check() == []
    finally:
        await _stop(server)


async def _stop(server: AnnouncingServer) -> None:
    """The steps of `server.shutdown` without the tenth of a second that it always waits."""
    server._farewell()
    for listener in server.servers:
        listener.close()
    for connection in list(server.server_state.connections):
        connection.shutdown()
    if server.server_state.tasks:
        await asyncio.wait(server.server_state.tasks)
    await server.lifespan.shutdown()


class EscrowProcess:
    """A real `x402mw escrow serve` process on one database and port, which may die and return."""

    def __init__(self, db: str, *options: str, port: int = 0) -> None:
        self.db = db
        self.port = port
        self.url = ""
        self.root_key = ""
        self._options = options
        self._process: subprocess.Popen[str] | None = None

    def start(self, timeout_seconds: float = 30) -> None:
        """Starts it and waits until it listens. A second start takes the same port again."""
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "x402mw.cli", "escrow", "serve"),
                *("--db", self.db, "--port", str(self.port), *self._options),
            ],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "X402MW_ROOT_KEY": b64url_encode(ROOT_SEED)},
        )
        assert self._process.stdout is not None
        watchdog = threading.Timer(timeout_seconds, self._process.kill)
        watchdog.start()
        lines = dict(self._process.stdout.readline().strip().partition("=")[::2] for _ in range(2))
        watchdog.cancel()
        assert "X402MW_ESCROW" in lines, "the escrow did not start"
        self.url, self.root_key = lines["X402MW_ESCROW"], lines["X402MW_ESCROW_ROOT"]
        self.port = int(self.url.rpartition(":")[2])

    def terminate(self) -> int:
        """Stops it politely; returns its exit status, 0 if it ended well."""
        return self._end(signal.SIGTERM)

    def kill(self) -> int:
        """Stops it like a power cut of the process: SIGKILL."""
        return self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(number)
        status = process.wait(timeout=30)
        if process.stdout is not None:
            process.stdout.close()
        return status

    def deposit(self, agent_id: str, amount: str) -> None:
        """Books money with the operator's command."""
        self.command("escrow", "deposit", "--db", self.db, agent_id, amount)

    def check(self) -> None:
        """Proves the books with the operator's command, or fails with what it says."""
        self.command("escrow", "check", "--db", self.db)

    def command(self, *arguments: str) -> str:
        """Runs one command of the project's command line and returns what it prints."""
        done = subprocess.run(
            [sys.executable, "-m", "x402mw.cli", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "X402MW_ROOT_KEY": b64url_encode(ROOT_SEED)},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@contextmanager
def escrow_process(place: Path | str, *options: str, port: int = 0) -> Iterator[EscrowProcess]:
    """Runs a real escrow process for a block; it is killed at the end if it still runs.

    `place` is a folder for a SQLite file, or the URL of a database.
    """
    process = EscrowProcess(database_in(place), *options, port=port)
    process.start()
    try:
        yield process
    finally:
        process.kill()

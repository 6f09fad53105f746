"""The escrow as a party: the real API on the real ledger, which may be away, or fail to commit."""

import asyncio
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import event

from tests.simulation.clocks import Clock
from tests.simulation.loop import HERE, Killed, Process, SimLoop
from tests.simulation.network import Network
from tests.simulation.patches import empty_books
from tests.support.escrow import reading
from x402mw.core.amounts import Atomic
from x402mw.core.strict import loads_object
from x402mw.escrow import agents, books
from x402mw.escrow.app import create_app
from x402mw.escrow.settings import Settings

HOST = "escrow.example"
URL = f"https://{HOST}"
ROOT_SEED = b"simulated escrow root seed 32 by"
FEE_BPS = 100


@dataclass(frozen=True)
class Account:
    """An agent at the escrow."""

    agent_id: str
    api_key: str


class EscrowParty:
    """One escrow service and its database."""

    def __init__(self, loop: SimLoop, network: Network, folder: Path, clock: Clock) -> None:
        self.loop, self.network, self.clock = loop, network, clock
        self.path = folder / "escrow.db"
        self.path.write_bytes(empty_books())
        self.settings = Settings(str(self.path), ROOT_SEED, fee_bps=FEE_BPS)
        self.process: Process | None = None
        self.crash = ""
        self.excused = False
        self.starts = 0
        self.app: Any = None

    async def start(self) -> None:
        """Starts the service, and returns once it serves."""
        process = self.process = Process(self.loop, "escrow")
        app = self.app = create_app(self.settings, clock=self.clock)
        ready = asyncio.Event()
        process.spawn(_lifespan(app, ready))
        await ready.wait()
        if self.starts == 0:
            self._grow_old()
        self.starts += 1
        engine = app.state.ledger._engine.sync_engine
        event.listen(engine, "commit", self._before_commit)
        self.network.host(HOST).open(process, app)

    def _grow_old(self) -> None:
        """An escrow that has been up for long: no deadline waits for anybody (T5)."""
        with closing(sqlite3.connect(self.path)) as connection, connection:
            connection.execute("UPDATE service SET up_since = up_since - 100000")

    def freeze(self) -> None:
        """Ends what runs behind; the ledger itself stays usable."""
        if self.process is not None:
            self.process.alive = False

    def keep_alive(self) -> None:
        """Does what heartbeats in all the time that has passed would have done."""
        now = int(self.clock())
        with closing(sqlite3.connect(self.path)) as connection, connection:
            connection.execute("UPDATE service SET heartbeat = ?", (now,))

    def _before_commit(self, connection: Any) -> None:
        crash = self.crash
        if not crash or connection.get_execution_options().get("x402mw_reading"):
            return
        self.crash = ""
        if crash == "full":
            raise OSError("the disk is full")
        process = HERE.get()
        if crash == "after":
            connection.connection.dbapi_connection.commit()
        if process is not None:
            process.kill()
            raise Killed

    @property
    def up(self) -> bool:
        """Whether it serves."""
        return self.process is not None and self.process.alive

    def kill(self) -> None:
        """Ends it."""
        if self.process is not None:
            self.process.kill()

    @property
    def ledger(self) -> Any:
        """The real ledger."""
        return self.app.state.ledger

    async def new_agent(self, name: str, money: int) -> Account:
        """Opens an account, and puts money into it."""
        answer = await self.ledger.perform(lambda tx: agents.register(tx, name), caller=None)
        made = loads_object(answer.body.encode())
        agent_id = str(made["agent_id"])
        if money:
            await self.ledger.perform(
                lambda tx: agents.deposit(tx, agent_id, Atomic(money)), caller=None
            )
        return Account(agent_id, str(made["api_key"]))

    async def check_books(self) -> list[str]:
        """The ledger's own proof of its books."""
        async with reading(self.ledger) as connection:
            return await books.check(connection)


async def _lifespan(app: Any, ready: asyncio.Event) -> None:
    asked = False

    async def receive() -> Any:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "lifespan.startup"}
        return await asyncio.get_running_loop().create_future()

    async def send(message: Any) -> None:
        if message["type"] != "lifespan.startup.complete":
            raise RuntimeError(message.get("message", message["type"]))
        ready.set()

    await app({"type": "lifespan", "state": {}}, receive, send)


# What the oracle reads, past all of the ledger's code.


@dataclass(frozen=True)
class Escrowed:
    """One session at the escrow."""

    escrow_id: str
    status: str
    buyer: str
    provider: str
    amount: int
    released: int
    redeemed: int
    refunded: int
    fee: int
    expires_at: int
    claim_until: int
    closing_deadline: int
    close_reason: str | None


@dataclass(frozen=True)
class Ledgered:
    """The books, as they are on disk."""

    escrows: dict[str, Escrowed]
    balances: dict[str, int]


def read_books(path: Path) -> Ledgered:
    """Reads balances and sessions."""
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute(
            "SELECT escrow_id, status, buyer, provider, amount, released, redeemed, refunded, fee,"
            " expires_at, coalesce(claim_until, 0), coalesce(closing_deadline, 0), close_reason"
            " FROM escrows"
        )
        escrows = {row[0]: Escrowed(*row) for row in rows}
        balances = dict(connection.execute("SELECT account, balance FROM accounts"))
        return Ledgered(escrows, balances)


def count_topups(path: Path) -> dict[str, int]:
    """How often each session was topped up."""
    with closing(sqlite3.connect(path)) as connection:
        query = "SELECT escrow_id, count(*) FROM entries WHERE kind = 'top_up' GROUP BY escrow_id"
        return dict(connection.execute(query).fetchall())


def read_postings(path: Path) -> list[tuple[str, str, int]]:
    """Every movement of money there ever was: from, to, how much."""
    with closing(sqlite3.connect(path)) as connection:
        query = "SELECT source, target, amount FROM postings ORDER BY seq, line"
        return list(connection.execute(query))

"""The ledger: opens a database, and runs operations on it one transaction at a time.

An operation is an async function of a `Transaction` (`agents`, `sessions`, `redemption`). `perform`
gives it idempotency, applies the deadlines of the caller first, turns refusals into answers, and
runs it again when the database asks for that. Readers see a moment of their own.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from x402mw.core.amounts import display
from x402mw.core.errors import AmountInvalid, ConfigurationError
from x402mw.core.strict import b64url_encode, dumps
from x402mw.escrow import access, books, database, deadlines, idempotency, modes, schema
from x402mw.escrow.errors import Refused
from x402mw.escrow.events.news import News
from x402mw.escrow.idempotency import Answer, Key
from x402mw.escrow.keys import Signer
from x402mw.escrow.rows import fetch_escrows
from x402mw.escrow.rules.outage import UP_GRACE_SECONDS
from x402mw.escrow.rules.table import Event, InvalidState, NotCovered
from x402mw.escrow.settings import Settings
from x402mw.escrow.stats import Stats
from x402mw.escrow.thread import Result, Threads, Work
from x402mw.escrow.transactions import Transaction

Clock = Callable[[], float]
Operation = Callable[[Transaction], Awaitable[dict[str, Any]]]
Decide = Callable[[Transaction], Awaitable[Answer | None]]

_log = logging.getLogger("x402mw.escrow")

ATTEMPTS_MAX = 5
READERS = 4
"""How many may read a SQLite file at once."""


_TAKING = (Event.REFUND, Event.SETTLE, Event.BUYER_CLOSE)
_DELIVERED = "this was delivered: the provider's refund, an arbiter or the end gives it back"
"""Also of a delivery that was rejected, when the escrow itself is not called delivered any more."""


class Ledger:
    """One escrow's books. Make it with `open_ledger`.

    Only a serving ledger writes heartbeats: a command on the same database must not make a
    service that is down look alive.
    """

    def __init__(
        self, engine: AsyncEngine, settings: Settings, clock: Clock, *, serving: bool
    ) -> None:
        self.settings = settings
        self.signer = Signer(settings)
        self.stats = Stats(self)
        self._engine = engine
        self._thread = _open_threads(engine, 1, reading=False)
        self._readers = _open_threads(engine, READERS, reading=True)
        self._clock = clock
        self._serving = serving
        # Our own writers queue here in order, instead of polling for the database's lock.
        self._writer = asyncio.Lock()
        self._running: set[Key | None] = set()
        self.news = News()

    def now(self) -> int:
        """The whole second it is."""
        return int(self._clock())

    async def read(self, work: Work[Result]) -> Result:
        """Does some work that only reads, and sees one moment; on SQLite all in one thread."""
        if self._readers is not None:
            return await self._readers.transact(work)
        async with database.reading(self._engine) as connection:
            return await work(connection)

    @asynccontextmanager
    async def write(self) -> AsyncIterator[Transaction]:
        """The one writing transaction; commits at the end, or not at all."""
        async with (
            self._writer,
            self._engine.begin() as connection,
            self._transaction(connection) as tx,
        ):
            yield tx
        self.news.tell()

    async def write_aside(self, work: Work[Result]) -> Result:
        """Does some work that touches no money, so on PostgreSQL it waits for no other writer."""
        if self._thread is not None:
            async with self._writer:
                return await self._thread.transact(work)
        async with self._engine.begin() as connection:
            return await work(connection)

    @asynccontextmanager
    async def _transaction(self, connection: AsyncConnection) -> AsyncIterator[Transaction]:
        tx = await Transaction.begin(
            connection, now=self.now(), settings=self.settings, signer=self.signer
        )
        await self.signer.refresh(connection, tx.service.key_serial)
        if self._serving:
            await deadlines.beat(tx)
            await tx.flush()
        yield tx
        await tx.flush()

    async def perform(
        self,
        operation: Operation,
        *,
        caller: str | None,
        key_id: str | None = None,
        key: Key | None = None,
        status: int = 200,
    ) -> Answer:
        """Runs one operation for an agent and returns its answer, refusals included.

        `key_id` is the API key that let it in, and must still work when its turn comes.
        """

        async def decide(tx: Transaction) -> Answer | None:
            if key_id is not None:
                await access.check_key(tx, key_id)
            return await _answer(tx, operation, caller, key, status)

        with self._alone(key):
            # While too much is due for one transaction, others take their turns in between.
            while (answer := await self._insist(decide)) is None:
                pass
            return answer

    async def _insist(self, decide: Decide) -> Answer | None:
        """Runs a transaction again when the database asks for that."""
        for attempts_left in reversed(range(ATTEMPTS_MAX)):
            try:
                return await self._decide(decide)
            except DBAPIError as error:
                if not (attempts_left and database.is_conflict(error)):
                    raise
        raise AssertionError("the last attempt returns or raises")

    async def _decide(self, work: Decide) -> Answer | None:
        """Does some work in the writing transaction; on SQLite all of it in one thread."""
        if self._thread is None:
            async with self.write() as tx:
                return await work(tx)

        async def within(connection: AsyncConnection) -> Answer | None:
            async with self._transaction(connection) as tx:
                return await work(tx)

        async with self._writer:
            answer = await self._thread.transact(within)
        self.news.tell()
        return answer

    @contextmanager
    def _alone(self, key: Key | None) -> Iterator[None]:
        """Refuses a key that another request of this process is working on."""
        if key in self._running:
            raise idempotency.running()
        if key is not None:
            self._running.add(key)
        try:
            yield
        finally:
            self._running -= {key}

    async def read_of(
        self, name: str, work: Work[Result], of: deadlines.Of = deadlines.Of.PARTY
    ) -> Result:
        """Reads something of an agent, or `of` one escrow, once its deadlines are applied (T2)."""
        now = self.now()

        async def look(connection: AsyncConnection) -> tuple[bool, Result]:
            return await deadlines.any_due(connection, of, name, now), await work(connection)

        # Usually none is due.
        due, found = await self.read(look)
        if not (due and self._serving):
            return found
        if of is deadlines.Of.ONE:
            async with self.write() as tx:
                await deadlines.apply_to_one(tx, name)
        else:
            await self.apply_all(name)
        return await self.read(work)

    async def apply_all(self, agent: str | None = None) -> None:
        """Does what time has done, to escrows of one agent or of all, some in each transaction."""
        due = deadlines.SWEEP_ITEMS_MAX
        while due == deadlines.SWEEP_ITEMS_MAX:
            async with self.write() as tx:
                due = await deadlines.apply(tx, agent, limit=deadlines.SWEEP_ITEMS_MAX)

    async def sweep(self) -> None:
        """What the background task does: heartbeat, deadlines of everyone, old answers."""
        # First what commits whatever becomes of the deadlines: the heartbeat is in it.
        async with self.write() as tx:
            await idempotency.prune(tx)
        try:
            await self.apply_all()
        except Exception as error:
            if database.is_unavailable(error):
                raise
            await self._apply_each()

    async def _apply_each(self) -> None:
        """One by one what time has done, so that one escrow that fails keeps no other waiting."""
        query = deadlines.due_query(deadlines.Of.ALL)
        values = {"now": self.now(), "limit": deadlines.NO_LIMIT}
        for escrow in await self.read(lambda db: fetch_escrows(db, query, values)):
            try:
                async with self.write() as tx:
                    await deadlines.apply_to_one(tx, escrow.escrow_id)
            except Exception as error:
                if database.is_unavailable(error):
                    raise
                extra = {"event": "deadline_failed", "escrow": escrow.escrow_id}
                _log.exception("a deadline could not be applied", extra=extra)

    async def rotate_keys(self) -> None:
        """Retires the signing key and starts the next; the serial of the key set rises."""
        async with self.write() as tx:
            tx.service.key_serial += 1
            await self.signer.add_key(tx.connection, self.signer.number + 1, tx.now)

    async def key_set(self) -> str:
        """The signed key set, fresh."""

        async def sign(connection: AsyncConnection) -> str:
            serial = (await connection.execute(select(schema.service.c.key_serial))).scalar_one()
            return await self.signer.key_set(connection, serial, self.now())

        return await self.read(sign)

    async def close(self) -> None:
        """Lets go of the database."""
        for threads in (self._thread, self._readers):
            if threads is not None:
                await threads.close()
        await self._engine.dispose()


def _open_threads(engine: AsyncEngine, count: int, *, reading: bool) -> Threads | None:
    """Threads that block, where there is a file to work on."""
    if not database.may_block(engine):
        return None
    return Threads(engine, database.open_blocking(engine, count, reading=reading), count)


async def _answer(
    tx: Transaction, operation: Operation, caller: str | None, key: Key | None, status: int
) -> Answer | None:
    """Decides one operation inside its transaction; its answer commits with its effects.

    None if more may be due to the caller than one transaction does: then commit, and come again.
    """
    if key is not None and (stored := await idempotency.find(tx, key)) is not None:
        return stored
    if caller is not None:
        limit = deadlines.SWEEP_ITEMS_MAX
        if await deadlines.apply(tx, caller, limit=limit) == limit:
            return None
    tx.actor = caller
    try:
        answer = Answer(status, _text(await operation(tx)))
    except (Refused, InvalidState, NotCovered, AmountInvalid) as error:
        tx.discard()
        refusal = _refusal(error)
        answer = Answer(refusal.status, _text(refusal.problem()))
    if key is not None:
        await idempotency.store(tx, key, answer)
    return answer


def _text(body: dict[str, Any]) -> str:
    return dumps(body).decode()


def _refusal(error: Refused | InvalidState | NotCovered | AmountInvalid) -> Refused:
    """What an operation refused, as the caller is told."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, InvalidState):
        taking = error.status == "delivered" and error.event in _TAKING
        detail = _DELIVERED if taking else str(error)
        return Refused(409, "invalid_state", detail, state=error.status)
    if isinstance(error, NotCovered):
        available = display(error.available)
        detail = f"only {available} is {error.what}"
        return Refused(409, "not_covered", detail, available=available)
    return Refused(409, "amount_out_of_range", str(error))


async def open_ledger(settings: Settings, clock: Clock, *, serving: bool) -> Ledger:
    """Opens the books: newest schema, first key, and the same network and root key as ever."""
    engine = database.open_engine(settings.database_url)
    try:
        ledger = Ledger(engine, settings, clock, serving=serving)
        async with engine.begin() as connection:
            await database.migrate(connection)
            await _found(connection, ledger)
    except BaseException:
        await engine.dispose()
        raise
    return ledger


@asynccontextmanager
async def visit_ledger(settings: Settings, clock: Clock) -> AsyncIterator[Ledger]:
    """Opens the books beside the service, for a command; or before it, to see that they open."""
    ledger = await open_ledger(settings, clock, serving=False)
    try:
        yield ledger
    finally:
        await ledger.close()


async def find_network(url: str) -> str:
    """The network name of a database that exists: what a command beside the service needs."""
    async with database.visiting(url) as connection:
        return str((await connection.execute(select(schema.service.c.network))).scalar_one())


async def _found(connection: AsyncConnection, ledger: Ledger) -> None:
    """Writes the first rows of a new database, or checks that they are ours."""
    root_key = b64url_encode(ledger.signer.root_key)
    row = (await connection.execute(select(schema.service))).one_or_none()
    if row is None:
        await _write_first_rows(connection, ledger, root_key)
    elif (row.network, row.root_key) != (ledger.settings.network, root_key):
        raise ConfigurationError("this database belongs to another network or root key")
    else:
        await ledger.signer.prove_keys(connection)


async def _write_first_rows(connection: AsyncConnection, ledger: Ledger, root_key: str) -> None:
    now = ledger.now()
    assets = [modes.asset_of(ledger.settings.asset.code, mode) for mode in modes.MODES]
    accounts = [
        {"account": name(asset), "asset": asset, "balance": 0}
        for asset in assets
        for name in (modes.world, modes.faucet, modes.house)
    ]
    await connection.execute(insert(schema.accounts), accounts)
    await connection.execute(
        insert(schema.service).values(
            id=1,
            network=ledger.settings.network,
            root_key=root_key,
            entry_seq=0,
            entry_hash=books.GENESIS,
            change_seq=0,
            heartbeat=now,
            # Nobody has missed a deadline yet.
            up_since=now - UP_GRACE_SECONDS,
            key_serial=1,
        )
    )
    await ledger.signer.add_key(connection, 1, now)

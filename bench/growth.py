"""What an operation of the escrow costs beside many finished escrows, and beside bare SQLite.

    python -m bench.growth [--large 1000000] [--rounds 5]

Two SQLite files, one with 1,000 finished escrows and one with very many, are worked on in turn: the
same operations on manual escrows, one at a time, through the ledger. The table shows the medians,
in microseconds of CPU (all threads) and by the clock, and the large file's over the small one's.

The last lines compare a single release with a transaction of Python's own `sqlite3` that writes the
same rows with the same durability, and nothing else: no rules, no idempotency, no reading. Once as
it is, which blocks its caller, and once awaited from an event loop, as a release is.
"""

import argparse
import asyncio
import json
import secrets
import sqlite3
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

from sqlalchemy.ext.asyncio import AsyncConnection

from tests.support.escrow import ROOT_SEED
from x402mw.core.amounts import Atomic
from x402mw.escrow import agents, manual, manual_bodies, sessions
from x402mw.escrow.ledger import Ledger, open_ledger
from x402mw.escrow.settings import Settings
from x402mw.escrow.transactions import Transaction

SMALL = 1000
OPERATIONS = 100
PAGE = 100
RAW, AWAITED = "raw sqlite3", "raw sqlite3, awaited"
_IDS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"

Answer = dict[str, object]


async def fill(url: str, finished: int) -> tuple[Ledger, str, str]:
    """A ledger with so many finished escrows, its buyer and its provider."""
    ledger = await open_ledger(Settings(url, ROOT_SEED), time.time, serving=True)
    async with ledger.write() as tx:
        buyer = (await agents.register(tx, "buyer"))["agent_id"]
        provider = (await agents.register(tx, "provider"))["agent_id"]
        await agents.deposit(tx, buyer, Atomic(10**12))
    model = await perform(ledger, buyer, lambda tx: manual.create(tx, buyer, wish(provider)))
    await perform(ledger, buyer, lambda tx: pay(tx, buyer, str(model["escrow_id"]), None))
    await ledger.close()
    _multiply(url, str(model["escrow_id"]), finished)
    return await open_ledger(Settings(url, ROOT_SEED), time.time, serving=True), buyer, provider


def _multiply(url: str, model: str, finished: int) -> None:
    """Copies one finished escrow with its account, entries and postings so many times."""
    with sqlite3.connect(url) as db:
        db.execute("CREATE TEMP TABLE made (i INTEGER PRIMARY KEY, name TEXT)")
        name = "'esc_' || lower(hex(randomblob(16)))"
        make = f"{_IDS} INSERT INTO made SELECT i, {name} FROM n"  # noqa: S608 (own names)
        db.execute(make, (finished,))
        _copy(db, "accounts", f"account = 'escrow:{model}'", {"account": "'escrow:' || made.name"})
        names = {"escrow_id": "made.name"}
        opened = {"opened": "made.i + 10", "change": "made.i + 10"}
        _copy(db, "escrows", f"escrow_id = '{model}'", names | opened)
        _copy(db, "agreements", f"escrow_id = '{model}'", names)
        _copy(db, "parts", f"escrow_id = '{model}'", names)
        entries = f"escrow_id = '{model}'"
        _copy(db, "entries", entries, names | {"seq": "old.seq + made.i * 2"})
        _copy(
            db,
            "postings",
            f"old.seq IN (SELECT seq FROM entries WHERE {entries})",  # noqa: S608 (own names)
            {"seq": "old.seq + made.i * 2"},
        )
        db.execute("UPDATE service SET change_seq = change_seq + 20 + ?", (finished,))
        db.execute("UPDATE service SET entry_seq = (SELECT max(seq) FROM entries)")
        db.commit()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _copy(db: sqlite3.Connection, table: str, where: str, changed: dict[str, str]) -> None:
    columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
    values = ", ".join(changed.get(column, f"old.{column}") for column in columns)
    rows = f"SELECT {values} FROM made, {table} AS old WHERE {where}"  # noqa: S608 (own names)
    db.execute(f"INSERT INTO {table} ({', '.join(columns)}) {rows}")


def wish(provider: str) -> manual_bodies.NewManual:
    """A lock of $10."""
    return manual_bodies.NewManual.model_validate({"to_agent_id": provider, "amount": "10.00"})


async def pay(tx: Transaction, buyer: str, name: str, units: int | None) -> Answer:
    """Releases some units, or all."""
    body = manual_bodies.Pay.model_construct(amount=None if units is None else Fraction(units))
    return await manual.release(tx, buyer, name, body)


async def perform(
    ledger: Ledger, caller: str, operation: Callable[[Transaction], Awaitable[Answer]]
) -> Answer:
    """One operation, which must succeed."""
    answer = await ledger.perform(operation, caller=caller)
    if answer.status >= 400:
        raise RuntimeError(answer.body)
    found: Answer = json.loads(answer.body)
    return found


class Timed:
    """Samples by name: (CPU, clock) in microseconds for one operation."""

    def __init__(self) -> None:
        self.samples: dict[str, list[tuple[float, float]]] = defaultdict(list)

    async def measure(
        self, name: str, count: int, work: Callable[[int], Awaitable[object]]
    ) -> None:
        """Does a piece of work so many times, one after another."""
        cpu, clock = time.process_time(), time.perf_counter()
        for number in range(count):
            await work(number)
        cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
        self.samples[name].append((1e6 * cpu / count, 1e6 * clock / count))

    def median(self, name: str) -> tuple[float, float]:
        """The medians of a name."""
        cpu, clock = zip(*self.samples[name], strict=True)
        return statistics.median(cpu), statistics.median(clock)


async def round_of(timed: Timed, size: str, place: tuple[Ledger, str, str]) -> None:
    """Every operation in turn."""
    ledger, buyer, provider = place
    names: list[str] = []

    async def lock(_: int) -> None:
        made = await perform(ledger, buyer, lambda tx: manual.create(tx, buyer, wish(provider)))
        names.append(str(made["escrow_id"]))

    async def release(number: int) -> None:
        await perform(ledger, buyer, lambda tx: pay(tx, buyer, names[number], 1_000_000))

    async def show(number: int) -> None:

        async def look(connection: AsyncConnection) -> Answer:
            escrow = await sessions.as_party(connection, buyer, names[number])
            return await manual.show(connection, escrow)

        await ledger.read_of(buyer, look)

    async def page(_: int) -> None:
        await ledger.read(
            lambda db: sessions.show_all(db, buyer, role=None, status=None, limit=PAGE, after=None)
        )

    async def finish(number: int) -> None:
        await perform(ledger, buyer, lambda tx: pay(tx, buyer, names[number], None))

    for name, work in (
        ("lock", lock), ("release", release), ("status", show), ("list 100", page),
        ("full release", finish),
    ):  # fmt: skip
        await timed.measure(f"{name} {size}", OPERATIONS, work)


class Raw:
    """A copy of a ledger's file, on which releases are written by hand."""

    def __init__(self, url: str, place: tuple[Ledger, str, str], names: list[str]) -> None:
        """`names` are open escrows, as many as a round releases from."""
        with sqlite3.connect(url) as original, sqlite3.connect(f"{url}.raw") as db:
            original.backup(db)
        self.db = sqlite3.connect(f"{url}.raw", isolation_level=None, check_same_thread=False)
        self._thread = ThreadPoolExecutor(1)
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("PRAGMA synchronous=FULL")
        _, self._buyer, self._provider = place
        self._names = names

    async def blocking(self, number: int) -> None:
        """A release in the thread of the event loop, which waits for the disk with it."""
        self._release(number)

    async def awaited(self, number: int) -> None:
        """A release in a thread of its own, as a service must do it."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._release, number)

    def close(self) -> None:
        """Lets go of the file."""
        self._thread.shutdown()
        self.db.close()

    def _release(self, number: int) -> None:
        """The rows of one release of a cent: three balances, an entry, two postings, two rows."""
        name, execute = self._names[number], self.db.execute
        source, target, fees = f"escrow:{name}", f"agent:{self._provider}", "house:fees"
        execute("BEGIN IMMEDIATE")
        heads = execute("SELECT entry_seq + 1, entry_hash, change_seq + 1 FROM service")
        seq, previous_hash, change = heads.fetchone()
        new_hash = secrets.token_hex(32)
        update = "UPDATE accounts SET balance = balance + ? WHERE account = ?"
        self.db.executemany(update, [(-10_000, source), (9_900, target), (100, fees)])
        execute(
            "INSERT INTO entries (seq, kind, escrow_id, asset, created_at, effective_at, actor,"
            " before, previous_hash, hash) VALUES (?, 'release', ?, 'USDC', 1, 1, ?, ?, ?, ?)",
            (seq, name, self._buyer, seq - 1, previous_hash, new_hash),
        )
        moves = [(seq, 0, source, target, 9_900), (seq, 1, source, fees, 100)]
        self.db.executemany("INSERT INTO postings VALUES (?, ?, ?, ?, ?)", moves)
        execute(
            "UPDATE escrows SET status = 'partially_released', released = released + 10000,"
            " fee = fee + 100, change = ?, last_entry = ? WHERE escrow_id = ?",
            (change, seq, name),
        )
        execute(
            "UPDATE service SET entry_seq = ?, entry_hash = ?, change_seq = ? WHERE id = 1",
            (seq, new_hash, change),
        )
        execute("COMMIT")


async def copy_raw(url: str, place: tuple[Ledger, str, str]) -> Raw:
    """Locks what will be released by hand, and copies the file."""
    ledger, buyer, provider = place
    made = [
        await perform(ledger, buyer, lambda tx: manual.create(tx, buyer, wish(provider)))
        for _ in range(OPERATIONS)
    ]
    return Raw(url, place, [str(escrow["escrow_id"]) for escrow in made])


async def run(large: int, rounds: int) -> Timed:
    """All rounds."""
    timed = Timed()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        urls = [f"{folder}/small.db", f"{folder}/large.db"]
        places = [await fill(url, size) for url, size in zip(urls, (SMALL, large), strict=True)]
        raw = await copy_raw(urls[0], places[0])
        for _ in range(rounds):
            await round_of(timed, "small", places[0])
            await timed.measure(RAW, OPERATIONS, raw.blocking)
            await timed.measure(AWAITED, OPERATIONS, raw.awaited)
            await round_of(timed, "large", places[1])
        raw.close()
        for ledger, _, _ in places:
            await ledger.close()
    return timed


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    timed = asyncio.run(run(given.large, given.rounds))
    print(f"us each: {SMALL:,} finished escrows | {given.large:,} | ratio, by CPU and by the clock")
    for name in ("lock", "release", "status", "list 100", "full release"):
        small, large = timed.median(f"{name} small"), timed.median(f"{name} large")
        ratios = " ".join(f"{b / a:.2f}" for a, b in zip(small, large, strict=True))
        figures = " | ".join(f"{cpu:8.0f} {clock:8.0f}" for cpu, clock in (small, large))
        print(f"{name:14} {figures} | {ratios}")
    for name in (RAW, AWAITED):
        cpu, clock = timed.median(name)
        pairs = zip(timed.samples[name], timed.samples["release small"], strict=True)
        rate = statistics.median(raw[1] / ours[1] for raw, ours in pairs)
        print(f"{name:20} {cpu:8.0f} {clock:8.0f}; a release has {rate:.2f} of its rate")


if __name__ == "__main__":
    main()

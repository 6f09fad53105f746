"""The books: append-only, chained, and checked by a judge that notices."""

import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import create_engine, insert, inspect
from sqlalchemy.exc import IntegrityError

from tests.escrow.market import code_of, market
from tests.support.escrow import ROOT_SEED, MovingClock
from x402mw.core.amounts import AMOUNT_MAX, Atomic, display
from x402mw.core.errors import ConfigurationError
from x402mw.escrow import agents, database, schema
from x402mw.escrow.books import audit
from x402mw.escrow.errors import Refused
from x402mw.escrow.ledger import open_ledger
from x402mw.escrow.rows import balance_of
from x402mw.escrow.rules import FAUCET, HOUSE, WORLD, Transfer
from x402mw.escrow.settings import Settings

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One backend for the whole module, as its shared database wants."""
    return "asyncio"


@pytest.fixture(scope="module")
async def traded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with a little trade in it: open, closing and ended sessions."""
    path = tmp_path_factory.mktemp("traded")
    async with market(path) as m:
        names = [(await m.open("5.00"))["escrow_id"] for _ in range(3)]
        await m.redeem(
            {"voucher": m.voucher(names[0], "1"), "amount": "1"},
            {"voucher": m.voucher(names[1], "2"), "amount": "2", "final": True},
        )
        await m.post(m.buyer, f"/escrow/{names[2]}/close")
        await m.post(m.provider, "/faucet/claim")
    return path / "escrow.db"


@pytest.fixture
def raw(traded: Path, tmp_path: Path) -> sqlite3.Connection:
    """A copy of that database, opened without any of our code."""
    shutil.copy(traded, tmp_path / "escrow.db")
    return sqlite3.connect(tmp_path / "escrow.db", isolation_level=None)


async def test_real_trade_passes_the_check(traded: Path) -> None:
    """I1 to I9, I18, I19 hold on a database made through the API."""
    assert await audit(str(traded)) == []


@pytest.mark.parametrize("table", ["entries", "postings"])
@pytest.mark.parametrize("change", ["UPDATE {} SET seq = seq + 100", "DELETE FROM {}"])
def test_the_books_are_append_only(raw: sqlite3.Connection, table: str, change: str) -> None:
    """Rule 2: the database itself refuses to change or delete what was written."""
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        raw.execute(change.format(table))


@pytest.mark.parametrize("table", ["entries", "postings"])
def test_the_books_cannot_be_replaced(raw: sqlite3.Connection, table: str) -> None:
    """Rule 2: also not by INSERT OR REPLACE, which asks no DELETE trigger."""
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        raw.execute(f"INSERT OR REPLACE INTO {table} SELECT * FROM {table} LIMIT 1")


@pytest.mark.parametrize("column", ["amount", "released", "redeemed", "refunded", "fee", "change"])
def test_what_an_escrow_counted_never_falls(raw: sqlite3.Connection, column: str) -> None:
    """I6: L, R, F, redeemed and fee never fall, whoever writes."""
    with pytest.raises(sqlite3.IntegrityError, match="never falls"):
        raw.execute(f"UPDATE escrows SET {column} = {column} - 1 WHERE status = 'settled'")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE accounts SET balance = -1 WHERE account = 'house:fees'",
        "UPDATE accounts SET balance = 9223372036854775807 + 1 WHERE account = 'house:fees'",
        "UPDATE accounts SET balance = 0.5 WHERE account = 'house:fees'",
        "UPDATE accounts SET balance = 'x' WHERE account = 'house:fees'",
        "UPDATE escrows SET released = amount + 1",
        "UPDATE escrows SET amount = amount + 0.5",
        "UPDATE escrows SET redeemed = released + 1",
        "UPDATE escrows SET claim_until = expires_at + 1",
        "UPDATE escrows SET buyer = provider",
    ],
)
def test_the_database_is_a_second_wall(raw: sqlite3.Connection, statement: str) -> None:
    """M1 and I3 to I5: negative, overflowing, broken amounts are refused by the database too."""
    with pytest.raises(sqlite3.IntegrityError):
        raw.execute(statement)


FRAUDS: list[tuple[str, Callable[[sqlite3.Connection], object]]] = [
    ("I1", lambda db: db.execute("UPDATE accounts SET balance = 1 WHERE account = 'house:fees'")),
    ("I18", lambda db: db.execute(
        "UPDATE accounts SET balance = balance + CASE account WHEN 'faucet' THEN 1 ELSE -1 END"
        " WHERE account IN ('faucet', 'house:fees')")),
    ("I19", lambda db: db.execute("UPDATE entries SET kind = 'gift' WHERE seq = 2")),
    ("I19", lambda db: db.execute("UPDATE postings SET amount = amount + 1 WHERE seq = 2")),
    ("I19", lambda db: db.executescript(
        "DELETE FROM postings WHERE seq = (SELECT max(seq) FROM entries);"
        "DELETE FROM entries WHERE seq = (SELECT max(seq) FROM entries)")),
    ("I19", lambda db: db.execute("UPDATE entries SET effective_at = 1 WHERE seq = 1")),
    ("I4", lambda db: db.execute("UPDATE escrows SET amount = amount + 1 WHERE status='closing'")),
    ("I7", lambda db: db.execute("UPDATE escrows SET fee = fee + 1 WHERE status='settled'")),
    ("I8", lambda db: db.execute("UPDATE escrows SET buyer = provider, provider = buyer")),
    ("I9", lambda db: db.execute("UPDATE escrows SET status='settled' WHERE status='closing'")),
    ("I5", lambda db: db.execute("UPDATE escrows SET status='closing' WHERE status='settled'")),
]  # fmt: skip


@pytest.mark.parametrize(("invariant", "fraud"), FRAUDS)
async def test_the_judge_notices(
    raw: sqlite3.Connection,
    tmp_path: Path,
    invariant: str,
    fraud: Callable[[sqlite3.Connection], object],
) -> None:
    """I1 to I9, I18, I19: someone with the file and no triggers in the way is still found out."""
    for (name,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
        raw.execute(f"DROP TRIGGER {name}")
    fraud(raw)
    raw.close()
    violations = await audit(str(tmp_path / "escrow.db"))
    assert any(violation.startswith(invariant + " ") for violation in violations), violations


async def test_migrations_make_the_tables_that_queries_know(tmp_path: Path) -> None:
    """House: schema.py and the migrations name the same tables, columns and types."""
    engine = database.open_engine(str(tmp_path / "new.db"))
    for _ in range(2):
        async with engine.begin() as connection:
            await database.migrate(connection)
    await engine.dispose()
    sync = create_engine(f"sqlite:///{tmp_path / 'new.db'}")
    found = inspect(sync)
    made = {
        (table, column["name"], str(column["type"]), column["nullable"])
        for table in found.get_table_names()
        for column in found.get_columns(table)
        if table != "alembic_version"
    }
    sync.dispose()
    assert made == {
        (table.name, column.name, str(column.type), column.nullable)
        for table in schema.metadata.tables.values()
        for column in table.columns
    }


async def test_there_is_never_more_money_than_an_integer_holds(tmp_path: Path) -> None:
    """M1: all money together stays below 2^63; more is refused and moves nothing."""
    settings = Settings(str(tmp_path / "escrow.db"), ROOT_SEED)
    ledger = await open_ledger(settings, MovingClock(), serving=True)
    try:
        async with ledger.write() as tx:
            rich = (await agents.register(tx, "rich"))["agent_id"]
            poor = (await agents.register(tx, "poor"))["agent_id"]
            full = await agents.deposit(tx, rich, AMOUNT_MAX)
        assert full["balance"] == display(AMOUNT_MAX)
        for agent_id in (rich, poor):
            with pytest.raises(Refused, match="cannot hold"):
                async with ledger.write() as tx:
                    await agents.deposit(tx, agent_id, Atomic(1))
        with pytest.raises(IntegrityError):
            async with ledger.write() as tx:
                tx.post("fraud", [Transfer(HOUSE, FAUCET, Atomic(1))], "USDC")
        async with ledger.read() as connection:
            assert await balance_of(connection, WORLD) == -AMOUNT_MAX
    finally:
        await ledger.close()
    assert await audit(settings.database_url) == []


async def test_the_largest_amount_still_trades(tmp_path: Path) -> None:
    """M1: locking and redeeming 2^63 - 1 units works to the last unit, one more is refused."""
    async with market(tmp_path, balance=display(AMOUNT_MAX)) as m:
        over = await m.post(m.buyer, "/escrow", m.wish("9223372036854.775808"))
        assert code_of(over) == (422, "invalid_request")
        name = (await m.open(display(AMOUNT_MAX)))["escrow_id"]
        voucher = m.voucher(name, display(AMOUNT_MAX))
        (verdict,) = await m.redeem({"voucher": voucher, "amount": display(AMOUNT_MAX)})
        assert verdict["released"] == display(AMOUNT_MAX)
        assert await m.balance(m.provider) == display(AMOUNT_MAX - AMOUNT_MAX // 100)


async def test_a_database_keeps_its_root_key_and_network(tmp_path: Path) -> None:
    """Failures: another root key or network on an old database is found at start."""
    settings = Settings(str(tmp_path / "escrow.db"), ROOT_SEED)
    await (await open_ledger(settings, MovingClock(), serving=True)).close()
    for wrong in (
        replace(settings, root_seed=b"w" * 32),
        replace(settings, network="escrow:other"),
    ):
        with pytest.raises(ConfigurationError):
            await open_ledger(wrong, MovingClock(), serving=True)


@pytest.mark.parametrize(
    "changes", [{"network": "main"}, {"fee_bps": 10_001}, {"claim_seconds": 59}]
)
def test_settings_that_could_not_work(changes: dict) -> None:
    """House: wrong configuration is found when starting."""
    with pytest.raises(ConfigurationError):
        replace(Settings("x.db", ROOT_SEED), **changes)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("a.db", "sqlite+aiosqlite:///a.db"),
        ("/v/a.db", "sqlite+aiosqlite:////v/a.db"),
        ("sqlite:///a.db", "sqlite+aiosqlite:///a.db"),
        ("postgresql://u:p@h/d", "postgresql+asyncpg://u:p@h/d"),
    ],
)
def test_a_database_is_a_file_or_a_url(text: str, url: str) -> None:
    """Contract: --db takes a path or a URL."""
    assert database.normal_url(text) == url


@pytest.mark.parametrize("text", ["mysql://h/d", "sqlite://", "sqlite:///:memory:"])
def test_money_needs_a_database_that_lasts(text: str) -> None:
    """Failures: memory databases and unknown servers are refused at start."""
    with pytest.raises(ConfigurationError):
        database.database_file(text)


def modes(folder: Path) -> dict[str, int]:
    """Who may do what with each file of a folder."""
    return {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}


async def test_only_the_operator_reads_the_books(tmp_path: Path) -> None:
    """Security: a database file made here, and what SQLite keeps beside it, is not for others."""
    async with market(tmp_path):
        found = modes(tmp_path)
    assert found == {"escrow.db": 0o600, "escrow.db-wal": 0o600, "escrow.db-shm": 0o600}


async def test_what_the_database_objects_to_shows_no_values(tmp_path: Path) -> None:
    """Security: an error of the database in a log holds none of the values it was given."""
    engine = database.open_engine(str(tmp_path / "escrow.db"))
    async with engine.begin() as connection:
        await database.migrate(connection)
    broken = {"agent_id": "a", "name": "private", "key_hash": None, "created_at": 1}
    async with engine.connect() as connection:
        with pytest.raises(IntegrityError) as refused:
            await connection.execute(insert(schema.agents).values(broken))
    await engine.dispose()
    assert "private" not in str(refused.value)

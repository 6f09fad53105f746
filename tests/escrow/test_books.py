"""The books: append-only, chained, and checked by a judge that notices."""

import asyncio
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import Connection, insert, inspect, select
from sqlalchemy.exc import IntegrityError

from tests.escrow.conftest import DATABASES
from tests.escrow.market import Market, code_of, market
from tests.support.escrow import ROOT_SEED, MovingClock, reading
from tests.support.postgresql import database_name, fresh_database, shared_server
from x402mw.core.amounts import AMOUNT_MAX, Atomic, display
from x402mw.core.errors import ConfigurationError
from x402mw.escrow import agents, banking, database, modes, schema, sessions, tenants
from x402mw.escrow.books import audit
from x402mw.escrow.errors import Refused
from x402mw.escrow.ledger import open_ledger
from x402mw.escrow.rows import balance_of, fetch_escrows
from x402mw.escrow.rules.values import Transfer
from x402mw.escrow.settings import Settings

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One backend for the whole module, as its shared databases want."""
    return "asyncio"


@pytest.fixture(scope="module", params=DATABASES)
def traded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A database of each kind with a little trade in it: open, closing and ended sessions."""
    if request.param == "sqlite":
        url = str(tmp_path_factory.mktemp("traded") / "escrow.db")
        asyncio.run(_trade(url))
        yield url
    else:
        with fresh_database() as url:
            asyncio.run(_trade(url))
            yield url


async def _trade(url: str) -> None:
    async with market(url) as m:
        names = [(await m.open("5.00"))["escrow_id"] for _ in range(3)]
        await m.redeem(
            {"voucher": m.voucher(names[0], "1"), "amount": "1"},
            {"voucher": m.voucher(names[1], "2"), "amount": "2", "final": True},
        )
        await m.post(m.buyer, f"/escrow/{names[2]}/close")
        await _trade_by_hand(m)
        await m.post(m.provider, "/faucet/claim")
        await _come_and_go(m)


async def _trade_by_hand(m: Market) -> None:
    """A manual escrow with a delivery and an ended and an open dispute; a transfer, a bank line."""
    await m.escrow.new_agent("third")
    body = {"to_agent_id": m.provider.agent_id, "amount": "10.00", "on_expiry": "refund"}
    parts = [{"name": "draft", "amount": "4.00"}]
    more = {"condition": {"sha256": "0" * 64}, "milestones": parts, "review_seconds": 600}
    name = (await m.post(m.buyer, "/escrow", {**body, **more})).json()["escrow_id"]
    for agent, path, said in (
        (m.provider, "deliver", {"proof": "a proof", "milestone": "draft"}),
        (m.buyer, "dispute", {"amount": "3.00", "reason": "late", "evidence": "by a day"}),
        (m.provider, "dispute/evidence", {"content": "on time"}),
        (m.buyer, "dispute/withdraw", {}),
        (m.buyer, "dispute", {"amount": "2.00", "reason": "really late"}),
        (m.buyer, "release", {"amount": "1.00"}),
        (m.buyer, "extend", {"seconds": 60}),
    ):
        answer = await m.post(agent, f"/escrow/{name}/{path}", said)
        assert answer.status_code == 200, answer.text
    sent = {"to_agent_id": m.provider.agent_id, "amount": "1.00", "memo": "thanks"}
    assert (await m.post(m.buyer, "/transfers", sent)).status_code == 201
    async with m.escrow.ledger.write() as tx:
        await banking.book(tx, "op", "deposit", m.buyer.agent_id, Atomic(5), "line 1")


async def _come_and_go(m: Market) -> None:
    """A tenant, an agent with a handle and its end, keys that ended, a webhook."""
    async with m.escrow.ledger.write() as tx:
        await tenants.create(tx, "shop", "live")
        code = m.buyer.agent_id
        gone = await agents.register(tx, "gone", tenant="shop", handle="bot", referral_code=code)
        await sessions.revoke_agent(tx, gone["agent_id"], "operator")
    wish = {"url": "https://receiver.example/"}
    assert (await m.post(m.buyer, "/webhooks", wish)).status_code == 201
    for name in ("short", "rotated"):
        made = await m.post(m.buyer, "/agents/me/keys", {"name": name, "scopes": ["read"]})
        path = f"/agents/me/keys/{made.json()['key_id']}"
        if name == "short":
            answer = await m.http.delete(path, headers=m.buyer.headers)
        else:
            answer = await m.post(m.buyer, f"{path}/rotate", {"grace_seconds": 60})
        assert answer.is_success, answer.text


KEPT = ("evidence", "transfers", "bookings", "faucet_claims")
"""Tables beside the books whose rows stay as well."""


class Stranger:
    """Someone with the database and none of our code."""

    REFUSALS = (sqlite3.IntegrityError, asyncpg.PostgresError)

    def __init__(self, url: str) -> None:
        self.url = url
        self.is_sqlite = "://" not in url

    def run(self, *statements: str) -> None:
        """Runs statements, or raises one of `REFUSALS`."""
        if not self.is_sqlite:
            for statement in statements:
                shared_server().execute(statement, database_name(self.url))
            return
        with closing(sqlite3.connect(self.url, isolation_level=None)) as connection:
            connection.execute("PRAGMA foreign_keys = ON")
            for statement in statements:
                connection.execute(statement)

    def drop_guards(self) -> None:
        """Takes the triggers out of the way."""
        if self.is_sqlite:
            with closing(sqlite3.connect(self.url)) as connection:
                names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'")
                self.run(*(f"DROP TRIGGER {name}" for (name,) in names.fetchall()))
        else:
            tables = ("entries", "postings", "escrows", *KEPT)
            self.run(*(f"ALTER TABLE {table} DISABLE TRIGGER USER" for table in tables))


@pytest.fixture
def stranger(traded: str, tmp_path: Path) -> Iterator[Stranger]:
    """A copy of that database, in the hands of a stranger."""
    if "://" not in traded:
        yield Stranger(str(shutil.copy(traded, tmp_path / "escrow.db")))
    else:
        with fresh_database(database_name(traded)) as url:
            yield Stranger(url)


async def test_real_trade_passes_the_check(traded: str) -> None:
    """I1 to I9, I18, I19 hold on a database made through the API."""
    assert await audit(traded) == []


def test_the_books_are_append_only(stranger: Stranger) -> None:
    """Rule 2: the database itself refuses to change or delete what was written."""
    for table in ("entries", "postings"):
        for change in (f"UPDATE {table} SET seq = seq + 100", f"DELETE FROM {table}"):
            with pytest.raises(Stranger.REFUSALS, match="append-only"):
                stranger.run(change)


def test_the_books_cannot_be_replaced(stranger: Stranger) -> None:
    """Rule 2: also not by INSERT OR REPLACE and TRUNCATE, which ask no DELETE trigger."""
    for table in ("entries", "postings"):
        change = f"INSERT OR REPLACE INTO {table} SELECT * FROM {table} LIMIT 1"
        if not stranger.is_sqlite:
            change = f"TRUNCATE {table} CASCADE"
        with pytest.raises(Stranger.REFUSALS, match="append-only"):
            stranger.run(change)


BASELESS = [
    "INSERT INTO postings VALUES ('faucet', 'nobody', 1, 9, 1)",
    "INSERT INTO postings VALUES ('nobody', 'faucet', 1, 9, 1)",
    "INSERT INTO postings VALUES ('faucet', 'world', 99, 9, 1)",
    "DELETE FROM accounts WHERE account LIKE 'escrow:%'",
    "UPDATE accounts SET account = 'agent:x' WHERE account = 'faucet'",
]


def test_a_posting_stands_on_accounts_and_an_entry(stranger: Stranger) -> None:
    """Rule 2: no line without its entry and its two accounts, which are never taken away."""
    columns = "(source, target, seq, line, amount)"
    for statement in BASELESS:
        with pytest.raises(Stranger.REFUSALS, match=r"account|entry|FOREIGN KEY"):
            stranger.run(statement.replace("VALUES", f"{columns} VALUES"))


def test_what_an_escrow_counted_never_falls(stranger: Stranger) -> None:
    """I6: L, R, F, redeemed and fee never fall, whoever writes."""
    for column in ("amount", "released", "redeemed", "refunded", "fee", "change"):
        with pytest.raises(Stranger.REFUSALS, match="never falls"):
            stranger.run(f"UPDATE escrows SET {column} = {column} - 1 WHERE status = 'settled'")


OUT_OF_RANGE = [
    "UPDATE accounts SET balance = -1 WHERE account = 'house:fees'",
    "UPDATE accounts SET balance = 9223372036854775807 + 1 WHERE account = 'house:fees'",
    "UPDATE accounts SET balance = 9223372036854775808 WHERE account = 'house:fees'",
    "UPDATE accounts SET balance = 'x' WHERE account = 'house:fees'",
    "UPDATE escrows SET released = amount + 1",
    "UPDATE escrows SET redeemed = released + 1",
    "UPDATE escrows SET claim_until = expires_at + 1",
    "UPDATE escrows SET buyer = provider",
]


def test_the_database_is_a_second_wall(stranger: Stranger) -> None:
    """M1 and I3 to I5: negative, overflowing, broken amounts are refused by the database too."""
    for statement in OUT_OF_RANGE:
        with pytest.raises(Stranger.REFUSALS):
            stranger.run(statement)


FRAUDS: list[tuple[str, list[str]]] = [
    ("I1", ["UPDATE accounts SET balance = 1 WHERE account = 'house:fees'"]),
    ("I18", [
        "UPDATE accounts SET balance = balance + CASE account WHEN 'faucet' THEN 1 ELSE -1 END"
        " WHERE account IN ('faucet', 'house:fees')"]),
    ("I19", ["UPDATE entries SET kind = 'gift' WHERE seq = 2"]),
    ("I19", ["UPDATE postings SET amount = amount + 1"
        " WHERE seq = (SELECT min(seq) FROM postings)"]),
    ("I19", [
        "DELETE FROM postings WHERE seq = (SELECT max(seq) FROM entries)",
        "DELETE FROM entries WHERE seq = (SELECT max(seq) FROM entries)"]),
    ("I19", ["UPDATE entries SET effective_at = 1 WHERE seq = 1"]),
    ("I4", ["UPDATE escrows SET amount = amount + 1 WHERE status = 'closing'"]),
    ("I7", ["UPDATE escrows SET fee = fee + 1 WHERE status = 'settled'"]),
    ("I8", ["UPDATE escrows SET buyer = provider, provider = buyer"]),
    ("I9", ["UPDATE escrows SET status = 'settled' WHERE status = 'closing'"]),
    ("I5", ["UPDATE escrows SET status = 'closing' WHERE status = 'settled'"]),
]  # fmt: skip


@pytest.mark.parametrize(("invariant", "fraud"), FRAUDS)
async def test_the_judge_notices(stranger: Stranger, invariant: str, fraud: list[str]) -> None:
    """I1 to I9, I18, I19: someone with the file and no triggers in the way is still found out."""
    stranger.drop_guards()
    stranger.run(*fraud)
    violations = await audit(stranger.url)
    assert any(violation.startswith(invariant + " ") for violation in violations), violations


# The statement, and what is said to be wrong.
TAMPERING: list[tuple[str, str]] = [
    ("UPDATE evidence SET content = 'by a week' WHERE line = 1", "another sha256"),
    ("UPDATE evidence SET agent_id = (SELECT min(agent_id) FROM agents WHERE name = 'third')",
        "another agent_id"),
    ("DELETE FROM evidence WHERE line = 2", "row ('evidence'"),
    ("INSERT INTO evidence (escrow_id, number, line, agent_id, content, created_at)"
        " SELECT escrow_id, 2, 1, opener, 'x', 1 FROM disputes WHERE number = 2", "in no entry"),
    ("UPDATE parts SET proof = 'another'", "another proof"),
    ("UPDATE parts SET state = 'paid'", "another state"),
    ("UPDATE parts SET review_until = 1", "another review_until"),
    ("UPDATE parts SET amount = amount + 1", "other terms"),
    ("UPDATE agreements SET condition = 'sha256:1'", "other terms"),
    ("UPDATE agreements SET review_seconds = 1", "other terms"),
    ("DELETE FROM parts WHERE number = 1", "other terms"),
    ("UPDATE escrows SET payees = '[[\"a\",\"1\"]]' WHERE released = 0", "other terms"),
    ("UPDATE escrows SET on_expiry = 'release' WHERE kind = 'manual'", "other terms"),
    ("UPDATE escrows SET fee_bps = 0 WHERE released = 0", "other terms"),
    ("UPDATE escrows SET referrer = provider WHERE kind = 'manual'", "other terms"),
    ("UPDATE escrows SET memo = 'x' WHERE status = 'closing'", "other terms"),
    ("UPDATE escrows SET expires_at = expires_at + 1 WHERE kind = 'manual'", "another time"),
    ("UPDATE disputes SET reason = 'x' WHERE number = 1", "another reason"),
    ("UPDATE disputes SET amount = amount - 1 WHERE number = 1", "another amount"),
    ("UPDATE disputes SET status = 'resolved' WHERE number = 1", "another status"),
    ("UPDATE disputes SET status = 'resolved' WHERE number = 2", "for disputes over 0"),
    ("UPDATE disputes SET deadline = 1 WHERE number = 2", "another deadline"),
    ("UPDATE escrows SET disputed = 1 WHERE disputed > 0", "holds 1 for disputes over 2000000"),
    ("UPDATE transfers SET amount = amount + 1", "another amount"),
    ("UPDATE transfers SET memo = 'x'", "another memo"),
    ("DELETE FROM transfers", "row ('transfers'"),
    ("UPDATE bookings SET amount = amount + 1", "another amount"),
    ("UPDATE bookings SET reference = 'line 2'", "bank line line 2 is in no entry"),
    ("DELETE FROM bookings", "row ('bookings'"),
    ("UPDATE faucet_claims SET day = day - 1", "another day"),
    ("DELETE FROM faucet_claims", "row ('faucet_claims'"),
    ("UPDATE escrows SET due_at = 1 WHERE status = 'partially_released'", "ought to be"),
    ("UPDATE escrows SET due_at = due_at + 1 WHERE status = 'closing'", "ought to be"),
    ("UPDATE escrows SET due_at = 1 WHERE kind = 'manual'", "ought to be"),
    ("UPDATE escrows SET due_at = NULL WHERE kind = 'manual'", "ought to be"),
    ("UPDATE escrows SET status = 'locked' WHERE status = 'partially_released'", "ought to be"),
    ("UPDATE escrows SET status = 'delivered' WHERE kind = 'manual'", "ought to be"),
    ("UPDATE escrows SET status = 'closing', closing_deadline = claim_until, due_at = claim_until"
        " WHERE status = 'partially_released'", "ought to be"),
    ("UPDATE escrows SET closing_deadline = closing_deadline - 1, due_at = due_at - 1"
        " WHERE status = 'closing'", "closes at another time"),
    ("UPDATE escrows SET closing_deadline = 1 WHERE kind = 'manual'", "only a session"),
    ("UPDATE escrows SET claim_until = 1 WHERE status = 'partially_released'", "good for less"),
    ("UPDATE agreements SET carry = '9/10'", "another fraction"),
    ("UPDATE agents SET revoked_at = NULL WHERE name = 'gone'", "another end"),
    ("UPDATE agents SET revoked_at = 1 WHERE name = 'third'", "another end"),
    ("UPDATE agents SET referrer = NULL WHERE name = 'gone'", "another referrer"),
    ("UPDATE agents SET referrer = agent_id WHERE name = 'third'", "no entry says"),
    ("UPDATE agents SET handle = 'other' WHERE name = 'gone'", "another handle"),
    ("UPDATE agents SET handle = 'other' WHERE name = 'third'", "no entry says"),
    ("UPDATE agents SET tenant = 'public' WHERE name = 'gone'", "another tenant"),
    ("UPDATE agents SET tenant = 'operator' WHERE name = 'third'", "no entry says"),
    ("UPDATE agents SET tenant = 'public-test' WHERE name = 'third'", "another mode"),
    ("UPDATE accounts SET asset = 'USDC:test'"
        " WHERE account = (SELECT 'agent:' || agent_id FROM agents WHERE name = 'third')",
        "another mode"),
    ("UPDATE tenants SET mode = 'live' WHERE tenant = 'public-test'", "another mode"),
    ("UPDATE tenants SET mode = 'test' WHERE tenant = 'shop'", "another mode"),
    ("INSERT INTO tenants (tenant, mode, created_at) VALUES ('x', 'live', 1)", "in no entry"),
    ("UPDATE api_keys SET revoked_at = NULL WHERE name = 'short'", "another revoked_at"),
    ("UPDATE api_keys SET expires_at = NULL WHERE expires_at IS NOT NULL", "another expires_at"),
    ("UPDATE api_keys SET revoked_at = NULL"
        " WHERE agent_id = (SELECT agent_id FROM agents WHERE name = 'gone')",
        "another revoked_at"),
    ("UPDATE api_keys SET scopes = 'admin' WHERE name = 'short'", "another scopes"),
    ("UPDATE api_keys SET agent_id = (SELECT agent_id FROM agents WHERE name = 'third')"
        " WHERE name = 'short'", "another agent_id"),
    ("INSERT INTO api_keys (key_id, agent_id, key_hash, scopes, name, created_at)"
        " SELECT 'key_x', agent_id, 'x', 'spend', '', 1 FROM agents WHERE name = 'third'",
        "is in no entry"),
    ("UPDATE webhooks SET url = 'https://evil.example/'", "another url_sha256"),
    ("INSERT INTO webhooks (webhook_id, agent_id, url, events, status, created_at, since,"
        " generation) SELECT 'wh_x', agent_id, url, events, status, 1, since, 1 FROM webhooks",
        "is in no entry"),
    ("UPDATE webhooks SET agent_id = (SELECT agent_id FROM agents WHERE name = 'third')",
        "another agent_id"),
    ("UPDATE journals SET agent_id = (SELECT agent_id FROM agents WHERE name = 'third')",
        "belongs to another agent"),
]  # fmt: skip


@pytest.mark.parametrize(("fraud", "found"), TAMPERING)
async def test_rows_are_held_to_what_their_entries_said(
    stranger: Stranger, fraud: str, found: str
) -> None:
    """I20: terms, deliveries, disputes, evidence and lines of money cannot be rewritten unseen."""
    stranger.drop_guards()
    stranger.run(fraud)
    violations = await audit(stranger.url)
    assert any(one.startswith("I20 ") and found in one for one in violations), violations


MOVED = [
    (["UPDATE escrows SET due_at = 1 WHERE status = 'partially_released'"], "before the deadline"),
    (["UPDATE escrows SET due_at = 1, closing_deadline = 1 WHERE status = 'closing'"],
        "before the deadline"),
    (["UPDATE disputes SET deadline = 1 WHERE number = 2",
        "UPDATE escrows SET due_at = 1 WHERE kind = 'manual'"], "what it waited for"),
    (["UPDATE parts SET review_until = 1", "UPDATE escrows SET due_at = 1 WHERE kind = 'manual'"],
        "what it waited for"),
]  # fmt: skip


@pytest.mark.parametrize(("moved", "found"), MOVED)
async def test_what_the_service_did_at_a_moved_deadline_is_found(
    stranger: Stranger, moved: list[str], found: str
) -> None:
    """I20: no deadline counts before it was, though the rows agree with what was done."""
    stranger.run(*moved)
    ledger = await open_ledger(Settings(stranger.url, ROOT_SEED), MovingClock(), serving=True)
    try:
        await ledger.sweep()
    finally:
        await ledger.close()
    violations = await audit(stranger.url)
    assert any(one.startswith("I20 entry") and found in one for one in violations), violations


async def test_a_close_before_the_vouchers_end_is_found(stranger: Stranger) -> None:
    """I20: a session closes no sooner than vouchers are good that an entry spoke of."""
    stranger.run("UPDATE escrows SET claim_until = 1 WHERE status = 'partially_released'")
    ledger = await open_ledger(Settings(stranger.url, ROOT_SEED), MovingClock(), serving=True)
    try:
        async with ledger.write() as tx:
            query = select(schema.escrows).where(schema.escrows.c.claim_until == 1)
            (escrow,) = await fetch_escrows(tx.connection, query)
            assert sessions.close_as_buyer(tx, escrow)["status"] == "settled"
    finally:
        await ledger.close()
    violations = await audit(stranger.url)
    assert any("closes before vouchers were good until" in one for one in violations), violations


def test_what_was_said_is_append_only(stranger: Stranger) -> None:
    """Rule 2: the database refuses to change or delete statements, transfers, lines and claims."""
    for table in KEPT:
        again = f"INSERT OR REPLACE INTO {table} SELECT * FROM {table} LIMIT 1"
        changes = [f"UPDATE {table} SET created_at = 1", f"DELETE FROM {table}"]
        changes.append(again if stranger.is_sqlite else f"TRUNCATE {table} CASCADE")
        if table == "faucet_claims":
            changes[0] = "UPDATE faucet_claims SET day = 1"
        for change in changes:
            with pytest.raises(Stranger.REFUSALS, match="append-only"):
                stranger.run(change)


async def test_migrations_make_the_tables_that_queries_know(empty_db: str) -> None:
    """House: schema.py and the migrations name the same tables, columns and types."""
    engine = database.open_engine(empty_db)
    for _ in range(2):
        async with engine.begin() as connection:
            await database.migrate(connection)
            made = await connection.run_sync(_columns)
    await engine.dispose()
    assert made == {
        (table.name, column.name, str(column.type), column.nullable)
        for table in schema.metadata.tables.values()
        for column in table.columns
    }


def _columns(connection: Connection) -> set[tuple[str, str, str, bool]]:
    found = inspect(connection)
    return {
        (table, column["name"], str(column["type"]), column["nullable"])
        for table in found.get_table_names()
        for column in found.get_columns(table)
        if table != "alembic_version"
    }


async def test_there_is_never_more_money_than_an_integer_holds(db: str) -> None:
    """M1: all money together stays below 2^63; more is refused and moves nothing."""
    settings = Settings(db, ROOT_SEED)
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
        fraud = Transfer(modes.house("USDC"), modes.faucet("USDC"), Atomic(1))
        with pytest.raises(IntegrityError):
            async with ledger.write() as tx:
                tx.post("fraud", [fraud], "USDC")
        async with reading(ledger) as connection:
            assert await balance_of(connection, modes.world("USDC")) == -AMOUNT_MAX
    finally:
        await ledger.close()
    assert await audit(settings.database_url) == []


async def test_money_never_crosses_assets(db: str) -> None:
    """Rule 2: what would move between accounts of two assets is refused, and nothing is written."""
    ledger = await open_ledger(Settings(db, ROOT_SEED), MovingClock(), serving=True)
    live, other = modes.house("USDC"), modes.house("USDC:test")
    moves = [Transfer(modes.world("USDC"), live, Atomic(5))]
    both = [("USDC", moves), ("USDC:test", [Transfer(modes.world("USDC:test"), live, Atomic(5))])]
    try:
        for asset in ("USDC", "USDC:test"):
            for fraud in (Transfer(live, other, Atomic(1)), Transfer(other, live, Atomic(1))):
                with pytest.raises(IntegrityError):
                    async with ledger.write() as tx:
                        tx.post("fraud", [fraud], asset)
        with pytest.raises(ValueError, match="two assets"):  # noqa: PT012 (at the end of a block)
            async with ledger.write() as tx:
                for asset, lines in both:
                    tx.post("fraud", lines, asset)
        async with reading(ledger) as connection:
            assert await balance_of(connection, live) == 0
    finally:
        await ledger.close()
    assert await audit(db) == []


async def test_the_largest_amount_still_trades(db: str) -> None:
    """M1: locking and redeeming 2^63 - 1 units works to the last unit, one more is refused."""
    async with market(db, balance=display(AMOUNT_MAX)) as m:
        over = await m.post(m.buyer, "/escrow", m.wish("9223372036854.775808"))
        assert code_of(over) == (422, "invalid_request")
        name = (await m.open(display(AMOUNT_MAX)))["escrow_id"]
        voucher = m.voucher(name, display(AMOUNT_MAX))
        (verdict,) = await m.redeem({"voucher": voucher, "amount": display(AMOUNT_MAX)})
        assert verdict["released"] == display(AMOUNT_MAX)
        assert await m.balance(m.provider) == display(AMOUNT_MAX - AMOUNT_MAX // 100)


async def test_a_database_keeps_its_root_key_and_network(empty_db: str) -> None:
    """Failures: another root key or network on an old database is found at start."""
    settings = Settings(empty_db, ROOT_SEED)
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


def permissions_of(folder: Path) -> dict[str, int]:
    """Who may do what with each file of a folder."""
    return {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}


async def test_only_the_operator_reads_the_books(tmp_path: Path) -> None:
    """Security: a database file made here, and what SQLite keeps beside it, is not for others."""
    async with market(tmp_path):
        found = permissions_of(tmp_path)
    assert found == {"escrow.db": 0o600, "escrow.db-wal": 0o600, "escrow.db-shm": 0o600}


async def test_what_the_database_objects_to_shows_no_values(empty_db: str) -> None:
    """Security: an error of the database in a log holds none of the values it was given."""
    engine = database.open_engine(empty_db)
    async with engine.begin() as connection:
        await database.migrate(connection)
    broken = {"agent_id": "a", "name": "private", "tenant": None, "created_at": 1}
    async with engine.connect() as connection:
        with pytest.raises(IntegrityError) as refused:
            await connection.execute(insert(schema.agents).values(broken))
    await engine.dispose()
    assert "private" not in str(refused.value)

"""Books of older versions: brought up to date on both databases, with all that they held."""

import json
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, MetaData, insert, inspect, select
from sqlalchemy.ext.asyncio import AsyncConnection

from tests.escrow.market import Market, client_of
from tests.support.escrow import Agent, running_escrow
from x402mw.escrow import database, schema
from x402mw.escrow.books import audit

pytestmark = pytest.mark.anyio
OLD = json.loads((Path(__file__).parent / "books_0003.json").read_text())
"""What revision 0003 had written, and the secrets of its agents; 0001 has the same columns."""

MANUAL = json.loads((Path(__file__).parent / "books_0005.json").read_text())
"""The same of 0005: manual escrows with payees, a review and a dispute, a carry, a transfer."""


@pytest.fixture(params=["0001", "0003"])
async def old_db(request: pytest.FixtureRequest, empty_db: str) -> str:
    """A database of an older version that was traded in."""
    async with opened(empty_db) as connection:
        await connection.run_sync(lambda sync: database.upgrade(sync, request.param))
        await connection.run_sync(_fill, OLD)
    return empty_db


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[AsyncConnection]:
    """A connection that writes."""
    engine = database.open_engine(url)
    try:
        async with engine.begin() as connection:
            yield connection
    finally:
        await engine.dispose()


def _fill(connection: Connection, old: dict[str, Any]) -> None:
    tables = _reflect(connection)
    for name, rows in old["tables"].items():
        if rows:
            connection.execute(insert(tables[name]), rows)


def _reflect(connection: Connection) -> Any:
    metadata = MetaData()
    with warnings.catch_warnings():
        # It says that it skips an index by an expression.
        warnings.simplefilter("ignore")
        metadata.reflect(connection)
    return metadata.tables


def _read(connection: Connection) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [dict(row) for row in connection.execute(select(table)).mappings()]
        for name, table in _reflect(connection).items()
    }


async def test_books_of_an_older_version_are_kept(old_db: str) -> None:
    """House: the newest schema holds what an old one held, row by row, and passes the check."""
    async with opened(old_db) as connection:
        await database.migrate(connection)
        now = await connection.run_sync(_read)
        if not old_db.startswith("postgresql"):
            broken = await connection.exec_driver_sql("PRAGMA foreign_key_check")
            assert broken.all() == []
    for name, rows in OLD["tables"].items():
        for row in rows:
            kept = {column: value for column, value in row.items() if column != "key_hash"}
            assert any(kept.items() <= found.items() for found in now[name]), (name, kept)
    assert len(now["agents"]) == len(now["api_keys"]) == 2
    assert await audit(old_db) == []


async def test_an_old_agent_goes_on_with_its_key(old_db: str) -> None:
    """E22: a key of before the migration reads, spends and provides, and may no more."""
    async with running_escrow(old_db) as escrow, client_of(escrow.url) as http:
        buyer, provider = (Agent("", OLD["keys"][name]) for name in ("buyer", "provider"))
        m = Market(escrow, http, buyer, provider)
        me = (await m.get(buyer, "/agents/me")).json()
        assert (me["name"], me["tenant"], me["balance"]) == ("buyer", "public", "89.50")
        assert me["keys"][0]["scopes"] == ["provide", "read", "spend"]
        old = OLD["keys"]["open"]
        (verdict,) = await m.redeem({"voucher": m.voucher(old, "3.00"), "amount": "3.00"})
        assert verdict["released"] == "3.00"
        again = await m.post(buyer, f"/escrow/{old}/topup", {"amount": "2.50"}, key="k1")
        assert again.headers["idempotent-replayed"] == "true"
        twice = await m.post(provider, "/faucet/claim")
        assert twice.json()["code"] == "faucet_claimed"
        test = (await m.post(None, "/agents", {"name": "t", "mode": "test"})).json()
        claimed = await m.post(Agent("", test["api_key"]), "/faucet/claim")
        assert claimed.json()["balance"] == "100.00"


async def test_accounts_keep_their_guards(old_db: str) -> None:
    """I3: after the migration no account but the two worlds goes below zero."""
    async with opened(old_db) as connection:
        await database.migrate(connection)
    for account, allowed in (("faucet", False), ("house:fees:test", False), ("world:test", True)):
        change = f"UPDATE accounts SET balance = -1000000000 WHERE account = '{account}'"
        if allowed:
            async with opened(old_db) as connection:
                assert (await connection.exec_driver_sql(change)).rowcount == 1
        else:
            with pytest.raises(Exception, match=r"(?i)check"):
                async with opened(old_db) as connection:
                    await connection.exec_driver_sql(change)
    with pytest.raises(Exception, match="append-only"):
        async with opened(old_db) as connection:
            await connection.exec_driver_sql("DELETE FROM postings")


async def test_old_escrows_are_in_the_indexes_by_state(old_db: str) -> None:
    """Cost: 0007 indexes what goes on of the old books, and lists find it there."""
    async with running_escrow(old_db) as escrow, client_of(escrow.url) as http:
        buyer, provider = (Agent("", OLD["keys"][name]) for name in ("buyer", "provider"))
        m = Market(escrow, http, buyer, provider)
        whole = (await m.get(buyer, "/escrow")).json()["items"]
        states = {item["status"] for item in whole}
        assert OLD["keys"]["open"] in {item["escrow_id"] for item in whole}
        for status in states:
            for agent in (buyer, provider):
                found = (await m.get(agent, "/escrow", status=status)).json()
                assert found["items"] == [item for item in whole if item["status"] == status]
    async with opened(old_db) as connection:
        found = await connection.run_sync(lambda sync: inspect(sync).get_indexes("escrows"))
    made = {index["name"]: index["column_names"] for index in found}
    for party in ("buyer", "provider"):
        assert made[f"escrows_{party}_live"] == [party, "opened"]


async def test_old_bookings_are_kept_beside_those_of_fees(old_db: str) -> None:
    """Accounts: 0008 keeps every line of the bank; only a line of fees is of no agent."""
    agent = OLD["tables"]["agents"][0]["agent_id"]
    line = {"agent_id": agent, "amount": 5, "created_at": 1, "operator": "operator"}
    lines = [
        {**line, "reference": "in", "kind": "deposit"},
        {**line, "reference": "out", "kind": "withdrawal"},
    ]
    async with opened(old_db) as connection:
        await connection.run_sync(lambda sync: database.upgrade(sync, "0007"))
        await connection.execute(insert(schema.bookings), lines)
        await database.migrate(connection)
        assert (await connection.run_sync(_read))["bookings"] == lines
        fees = {**line, "reference": "fees", "kind": "fees", "agent_id": None}
        await connection.execute(insert(schema.bookings), fees)
    for wrong in ({"agent_id": None}, {"kind": "fees"}, {"kind": "gift"}, {"amount": 0}):
        row = {**lines[0], "reference": "wrong", **wrong}
        with pytest.raises(Exception, match=r"(?i)check"):
            async with opened(old_db) as connection:
                await connection.execute(insert(schema.bookings), row)


async def test_old_manual_escrows_go_on(empty_db: str) -> None:
    """House: what 0005 held of deliveries, disputes, carries and test money is kept and goes on."""
    async with opened(empty_db) as connection:
        await connection.run_sync(lambda sync: database.upgrade(sync, "0005"))
        await connection.run_sync(_fill, MANUAL)
    keys = MANUAL["keys"]
    async with running_escrow(empty_db) as escrow, client_of(escrow.url) as http:
        buyer, provider, toy = (Agent("", keys[name]) for name in ("buyer", "provider", "test"))
        m = Market(escrow, http, buyer, provider)
        assert await escrow.check() == []
        async with opened(empty_db) as connection:
            now = await connection.run_sync(_read)
        for name, rows in MANUAL["tables"].items():
            for row in rows:
                if name != "service":
                    assert any(row.items() <= found.items() for found in now[name]), (name, row)
        assert (await m.get(toy, "/agents/me")).json()["balance"] == "100.00"
        sent = {"to_agent_id": keys["provider_id"], "amount": "1.00"}
        again = await m.post(buyer, "/transfers", sent, key="t1")
        assert again.headers["idempotent-replayed"] == "true"
        (case,) = (await m.get(buyer, f"/escrow/{keys['disputed']}/disputes")).json()["items"]
        assert (case["amount"], case["evidence"][0]["content"]) == ("3.00", "e")
        await m.post(provider, f"/escrow/{keys['disputed']}/dispute/evidence", {"content": "no"})
        await m.post(buyer, f"/escrow/{keys['disputed']}/dispute/withdraw", {})
        await escrow.pass_time(700)
        delivered, disputed = [await m.show(keys[name]) for name in ("delivered", "disputed")]
        assert (delivered["released"], delivered["milestones"][0]["state"]) == ("4.00", "paid")
        assert (disputed["disputed"], disputed["carried_units"]) == ("0.00", "1/2")
        met = await m.post(provider, f"/escrow/{keys['disputed']}/condition", {"outcome": "x"})
        assert met.json()["met"] is True
        assert await escrow.check() == []


async def test_old_deliveries_have_their_turn(empty_db: str) -> None:
    """Webhooks: 0011 counts what waits for each and when it is due; none outlives its key."""
    agent = OLD["tables"]["agents"][0]["agent_id"]
    hook = {"agent_id": agent, "url": "https://b.example/", "events": "", "status": "active"}
    hook |= {"created_at": 1, "since": 0, "generation": 1}
    row = {"escrow_id": "", "event": "locked", "part": 0, "attempts": 0, "changed_at": 1}
    row |= {"webhook_id": "wh_1", "created_at": 1, "body": "{}"}
    sent = [
        {**row, "seq": seq, "state": state, "next_at": at}
        for seq, (state, at) in enumerate(
            [("waiting", 9), ("waiting", 7), ("waiting", None), ("dead", None)]
        )
    ]
    async with opened(empty_db) as connection:
        await connection.run_sync(lambda sync: database.upgrade(sync, "0003"))
        await connection.run_sync(_fill, OLD)
        await connection.run_sync(lambda sync: database.upgrade(sync, "0010"))
        key = connection.exec_driver_sql(f"SELECT key_id FROM api_keys WHERE agent_id = '{agent}'")
        ending = (await key).scalar_one()
        await connection.exec_driver_sql(
            f"UPDATE api_keys SET expires_at = 5 WHERE key_id = '{ending}'"
        )
        hooks = [{**hook, "webhook_id": name, "key_id": None} for name in ("wh_1", "wh_2")]
        hooks.append({**hook, "webhook_id": "wh_3", "key_id": ending})
        old = {"tables": {"webhooks": hooks, "deliveries": sent}}
        await connection.run_sync(_fill, old)
        await database.migrate(connection)
        now = await connection.run_sync(_read)
    turns = {each["webhook_id"]: (each["next_at"], each["waiting"]) for each in now["webhooks"]}
    assert turns == {"wh_1": (7, 3), "wh_2": (None, 0)}

"""The books as a whole: the operator's statement, and copies that pass the same proof."""

import json
import sqlite3
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from anyio import to_thread
from sqlalchemy import select
from typer.testing import CliRunner, Result

from tests.escrow.market import Market, market
from tests.support.escrow import ROOT_SEED, MovingClock
from x402mw.cli import app
from x402mw.core.errors import ConfigurationError
from x402mw.core.strict import b64url_encode
from x402mw.escrow import backup, database, schema
from x402mw.escrow.ledger import open_ledger
from x402mw.escrow.settings import Settings
from x402mw.escrow.statement import draw_up

pytestmark = pytest.mark.anyio


async def trade(m: Market) -> None:
    """A bit of everything that rows can hold."""
    session = (await m.open("5.00"))["escrow_id"]
    await m.redeem({"voucher": m.voucher(session, "1"), "amount": "1", "final": True})
    body = {"to_agent_id": m.provider.agent_id, "amount": "10.00", "review_seconds": 60}
    name = (await m.post(m.buyer, "/escrow", body)).json()["escrow_id"]
    await m.post(m.provider, f"/escrow/{name}/deliver", {"proof": "done"})
    await m.post(m.buyer, f"/escrow/{name}/release", {"amount": "1.0000005"})
    answer = await m.post(
        m.buyer, f"/escrow/{name}/dispute", {"amount": "2", "reason": "late", "evidence": "see"}
    )
    assert answer.status_code == 200, answer.text


@pytest.fixture
async def traded(db: str) -> str:
    """A database with a bit of everything, whose service has stopped."""
    async with market(db) as m:
        await trade(m)
    return db


async def all_rows(url: str) -> dict[str, list[Any]]:
    """Every row of every table."""
    async with database.visiting(url) as connection:
        return {
            table.name: sorted(map(repr, await connection.execute(select(table))))
            for table in schema.metadata.sorted_tables
        }


async def test_a_backup_restores_to_either_kind_of_database(
    traded: str, empty_db: str, tmp_path: Path
) -> None:
    """Issue 4, 9: backup and restore pass the same proof, row by row, also into the other kind."""
    file = str(tmp_path / "backup.db")
    entries = await backup.copy(traded, file)
    assert entries == await backup.copy(file, empty_db) > 5
    assert await all_rows(empty_db) == await all_rows(traded)
    assert (await draw_up(empty_db)).violations == []
    ledger = await open_ledger(Settings(empty_db, ROOT_SEED), MovingClock(), serving=True)
    await ledger.sweep()
    await ledger.close()
    assert (await draw_up(empty_db)).violations == []


async def test_an_escrow_that_is_there_is_not_touched(traded: str, tmp_path: Path) -> None:
    """A restore goes into an empty database or nowhere."""
    file = str(tmp_path / "backup.db")
    await backup.copy(traded, file)
    before = await all_rows(traded)
    with pytest.raises(ConfigurationError, match="already"):
        await backup.copy(file, traded)
    assert await all_rows(traded) == before


async def test_wrong_books_are_not_copied(traded: str, empty_db: str, tmp_path: Path) -> None:
    """What does not pass the proof is no backup, and nothing of it is restored."""
    file = tmp_path / "backup.db"
    await backup.copy(traded, str(file))
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE accounts SET balance = balance + 1 WHERE account = 'faucet'")
    with pytest.raises(ConfigurationError, match="wrong"):
        await backup.copy(str(file), empty_db)
    with pytest.raises(ConfigurationError, match="no escrow"):
        await draw_up(empty_db)


async def test_the_statement_sums_accounts_and_escrows(traded: str) -> None:
    """Issue 4, 9: balances per class come to 0, escrows are counted by state."""
    found = await draw_up(traded)
    assert sum(one.balance for one in found.accounts if one.asset == "USDC") == 0
    states = {(one.kind, one.status): one for one in found.escrows}
    assert states.keys() == {("session", "settled"), ("manual", "disputed")}
    manual = states["manual", "disputed"]
    assert (manual.locked, manual.released, manual.disputed) == (10_000_000, 1_000_000, 2_000_000)


async def invoke(*arguments: str) -> Result:
    """Runs a command, which has an event loop of its own."""
    return await to_thread.run_sync(partial(CliRunner().invoke, app, arguments))


async def test_the_commands_show_prove_and_copy(traded: str, tmp_path: Path) -> None:
    """`x402mw books`, `escrow backup` and `escrow restore` say what they did, in one line each."""
    shown = await invoke("books", "--db", traded)
    assert shown.exit_code == 0
    assert "I1 to I20 hold" in shown.output
    file, again = str(tmp_path / "out.db"), str(tmp_path / "again.db")
    for expected in (0, 1):
        assert (await invoke("escrow", "backup", file, "--db", traded)).exit_code == expected
    assert (await invoke("escrow", "restore", file, "--db", again)).exit_code == 0
    with sqlite3.connect(again) as connection:
        connection.execute("UPDATE accounts SET balance = balance + 1 WHERE account = 'faucet'")
    wrong = await invoke("books", "--json", "--db", again)
    assert wrong.exit_code == 1
    assert json.loads(wrong.output)["violations"]


async def test_the_root_key_is_not_in_a_backup(traded: str, tmp_path: Path) -> None:
    """A backup may lie where the root key must not."""
    file = tmp_path / "out.db"
    assert (await invoke("escrow", "backup", str(file), "--db", traded)).exit_code == 0
    content = file.read_bytes()
    assert ROOT_SEED not in content
    assert b64url_encode(ROOT_SEED).encode() not in content

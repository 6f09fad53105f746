"""The escrow as a process: the command line, clean ends, and SIGKILL in mid-run.

On SQLite, where nothing of it depends on the database; kills on PostgreSQL are in
`test_postgresql`.
"""

import asyncio
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from tests.escrow.market import joined
from tests.support.escrow import ROOT_SEED, EscrowProcess, MovingClock, escrow_process
from x402mw import cli
from x402mw.core.strict import b64url_decode, b64url_encode
from x402mw.core.tokens import open_key_set
from x402mw.escrow.books import audit
from x402mw.escrow.ledger import open_ledger
from x402mw.escrow.serve import AnnouncingServer
from x402mw.escrow.settings import Settings

pytestmark = pytest.mark.anyio
ROUNDS = 10 if os.environ.get("X402MW_LONG") else 2
PAUSE_SECONDS = 0.1


async def test_killed_in_mid_run_and_asked_again(tmp_path: Path) -> None:
    """I13: after each SIGKILL the same keys give the first results; nothing twice, nothing lost."""
    with escrow_process(tmp_path) as process:
        async with joined(process) as m:
            name = (await m.open("20.00"))["escrow_id"]
            for round_number in range(ROUNDS):
                await _one_round(process, m, name, round_number)
            assert await audit(process.db) == []
            end = await m.show(name)
            assert end["amount"] == f"{20 + 2 * ROUNDS}.00"
            assert await m.balance(m.buyer) == f"{80 - 2 * ROUNDS}.00"


async def _one_round(process: EscrowProcess, m, name: str, round_number: int) -> None:
    """Twenty top-ups of ten cents; the process dies at some moment among them."""

    async def top_up(number: int) -> dict[str, object]:
        key = f"round {round_number} number {number}"
        while True:
            try:
                answer = await m.post(m.buyer, f"/escrow/{name}/topup", {"amount": "0.10"}, key=key)
            except httpx.TransportError:
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            if answer.status_code == 200:
                return dict(answer.json())
            assert answer.status_code in (409, 503), answer.text
            await asyncio.sleep(PAUSE_SECONDS)

    async def kill() -> None:
        await asyncio.sleep(0.01 + 0.015 * (round_number % 5))
        process.kill()
        await asyncio.to_thread(process.start)

    results = await asyncio.gather(kill(), *(top_up(number) for number in range(20)))
    amounts = {result["amount"] for result in results if result}
    assert len(amounts) == 20, "each top-up happened exactly once, so each saw its own deposit"


def test_a_polite_end_has_status_zero_and_the_port_can_be_taken_again(tmp_path: Path) -> None:
    """Failures: SIGTERM ends cleanly; a restart on the same port and database works."""
    with escrow_process(tmp_path) as process:
        port = process.port
        assert process.terminate() == 0
        process.start()
        assert process.port == port
        assert httpx.get(f"{process.url}/health").json()["status"] == "ok"


def test_register_prints_what_a_shell_can_export(tmp_path: Path) -> None:
    """Contract: register gives NAME=value lines with all that a provider needs."""
    with escrow_process(tmp_path) as process:
        lines = process.command("register", "--escrow", process.url + "/", "my bot").split("\n")
        settings = dict(line.split("=", 1) for line in lines if line)
        assert settings["X402MW_ESCROW"] == process.url
        assert settings["X402MW_API_KEY"].startswith("pf_live_")
        assert settings["X402MW_JOURNAL"] == "x402mw-journal.db"
        assert settings["X402MW_ORIGINS"] == "http://127.0.0.1:8402"
        assert settings["X402MW_ESCROW_ROOT"] == process.root_key
        me = httpx.get(
            f"{process.url}/api/v1/agents/me",
            headers={"Authorization": f"Bearer {settings['X402MW_API_KEY']}"},
        )
        assert me.json()["agent_id"] == settings["X402MW_AGENT"]
        with pytest.raises(AssertionError, match=r"x402mw: .*name: .*\n$"):
            process.command("register", "--escrow", process.url, "")
        process.deposit(settings["X402MW_AGENT"], "25.50")
        assert process.command("escrow", "check", "--db", process.db).startswith("the books")


def test_a_proxy_on_the_same_machine_is_believed_in_every_spelling() -> None:
    """Contract: claims through a local proxy count under the client's address, by IPv6 too."""
    config = AnnouncingServer(lambda *_: None, lambda: None).config
    trusted = str(config.forwarded_allow_ips).split(",")
    assert trusted == ["127.0.0.1", "::1", "::ffff:127.0.0.1"]


def test_rotation_reaches_a_running_service(empty_db: str) -> None:
    """Keys: the operator's command rotates the key of a service that goes on running."""
    with escrow_process(empty_db) as process:
        process.command("escrow", "rotate-key", "--db", process.db)
        answer = httpx.get(f"{process.url}/.well-known/x402mw-keys").json()
        keys = open_key_set(answer["key_set"], b64url_decode(process.root_key, 32))
        assert (keys.serial, len(keys.keys), len(keys.retired)) == (2, 2, 1)


def refusal(
    arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """What a command that ends with status 1 says in its one line."""
    monkeypatch.setattr(sys, "argv", ["x402mw", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 1, (arguments, said)
    assert said.startswith("x402mw: "), said
    assert said.count("\n") == 1, said
    return said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("escrow check --db lost.db", "there is no database lost.db"),
        ("escrow check --db broken.db", "file is not a database"),
        ("escrow check --db other.db", "holds no escrow"),
        ("escrow check --db mysql://h/d", "a database is a file path"),
        ("escrow check --db postgresql://u:p@h:port/d", "a database is a file path"),
        ("escrow deposit --db lost.db AGENT 1", "there is no database lost.db"),
        ("escrow deposit --db lost.db AGENT x", "an amount is a decimal string"),
        ("escrow deposit --db good.db AGENT 1", "there is no agent AGENT"),
        ("escrow deposit --db good.db AGENT 0", "an amount of 0 moves nothing"),
        ("escrow deposit --db newer.db AGENT 1", "newer version"),
        ("escrow rotate-key --db other.db", "holds no escrow"),
        ("escrow serve --db x.db --host 203.0.113.7", "cannot listen on 203.0.113.7 port 8401"),
        ("escrow serve --db broken.db --port 0", "file is not a database"),
        ("escrow serve --db newer.db --port 0", "newer version"),
        ("escrow serve --db torn.db --port 0", "this database is damaged"),
        ("escrow serve --db good.db --network escrow:other", "another network or root key"),
        ("escrow serve --db x.db --network Main! --port 0", 'named like "escrow:main"'),
        ("register --escrow http://127.0.0.1:1 x", "did not answer as an escrow"),
        ("register --escrow http://h:99999 x", "did not answer as an escrow"),
    ],
)
def test_commands_refuse_in_one_line(
    arguments: str,
    says: str,
    odd_databases: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """House: a wrong command line ends with status 1 and one plain line, never a traceback."""
    monkeypatch.chdir(odd_databases)
    monkeypatch.setenv("X402MW_ROOT_KEY", b64url_encode(ROOT_SEED))
    words = arguments.replace("AGENT", "ag_" + "0" * 32).split()
    said = refusal(words, monkeypatch, capsys)
    assert says.replace("AGENT", "ag_" + "0" * 32) in said
    assert not Path("lost.db").exists()


@pytest.fixture(scope="module")
def odd_databases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an escrow's database, one damaged, one newer, one of others, and junk."""
    folder = tmp_path_factory.mktemp("odd")
    settings = Settings(str(folder / "good.db"), ROOT_SEED)

    async def make() -> None:
        await (await open_ledger(settings, MovingClock(), serving=True)).close()

    asyncio.run(make())
    shutil.copy(folder / "good.db", folder / "newer.db")
    with closing(sqlite3.connect(folder / "good.db")) as good:
        query = "SELECT rootpage * page_size FROM sqlite_master, pragma_page_size"
        (end,) = good.execute(f"{query} WHERE name = 'accounts'").fetchone()
    pages = (folder / "good.db").read_bytes()
    (folder / "torn.db").write_bytes(pages[: end - 4096] + b"7" * 4096 + pages[end:])
    for name, statement in (
        ("newer.db", "UPDATE alembic_version SET version_num = '9999'"),
        ("other.db", "CREATE TABLE others (x)"),
    ):
        with closing(sqlite3.connect(folder / name, isolation_level=None)) as other:
            other.execute(statement)
    (folder / "broken.db").write_text("this is no database, whatever its name says" * 100)
    return folder


def test_a_lost_root_key_is_told(
    odd_databases: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keys: beside a database without its root key the operator learns what to put back."""
    monkeypatch.delenv("X402MW_ROOT_KEY", raising=False)
    said = refusal(["escrow", "serve", "--db", f"{odd_databases}/good.db"], monkeypatch, capsys)
    assert "good.db.rootkey is missing" in said


def test_a_missing_driver_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """House: PostgreSQL without its extra names what to install."""
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    said = refusal(["escrow", "check", "--db", "postgresql://h/d"], monkeypatch, capsys)
    assert "x402mw[postgres]" in said


def test_a_password_can_stay_out_of_the_command_line(
    odd_databases: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Security: the database may be named by X402MW_ESCROW_DB, which other users cannot list."""
    monkeypatch.setenv("X402MW_ESCROW_DB", f"{odd_databases}/other.db")
    assert "holds no escrow" in refusal(["escrow", "check"], monkeypatch, capsys)


def test_a_fresh_service_makes_its_own_root_key(tmp_path: Path) -> None:
    """Keys: with no key given, one is made beside the database and used ever after."""
    environment = {name: text for name, text in os.environ.items() if name != "X402MW_ROOT_KEY"}
    lines = []
    for _ in range(2):
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "x402mw.cli", "escrow", "serve", "--port", "0"),
                *("--db", str(tmp_path / "escrow.db")),
            ],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert process.stdout is not None
        with process.stdout as out:
            assert out.readline().startswith("X402MW_ESCROW=http://127.0.0.1:")
            lines.append(out.readline())
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    assert lines[0] == lines[1]
    assert (tmp_path / "escrow.db.rootkey").stat().st_mode & 0o777 == 0o600


def test_an_operator_runs_accounts_from_the_command_line(
    odd_databases: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Accounts: tenants, agents, keys and bookings are made beside the service, each line once."""
    monkeypatch.chdir(odd_databases)
    monkeypatch.setenv("X402MW_ROOT_KEY", b64url_encode(ROOT_SEED))

    def run(arguments: str) -> str:
        words = ["x402mw", "escrow", *arguments.split(), "--db", "good.db"]
        monkeypatch.setattr("sys.argv", words)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        assert ended.value.code in (0, None), said
        return said.out

    assert run("tenant create bots --mode test") == "bots is a test tenant\n"
    made = run("agent create boss --tenant bots --scope admin --scope read")
    settings = dict(line.split("=") for line in made.splitlines())
    agent = settings["X402MW_AGENT"]
    assert settings["X402MW_API_KEY"].startswith("pf_test_")
    assert "pf_test_" in run(f"key create {agent} --scope arbiter")
    assert run(f"deposit {agent} 25.00 --reference line-1") == f"{agent} has 25.00\n"
    words = f"escrow deposit {agent} 25.00 --reference line-1 --db good.db".split()
    assert "was booked before" in refusal(words, monkeypatch, capsys)
    assert run(f"withdraw {agent} 5.00") == f"{agent} has 20.00\n"
    words = f"escrow withdraw {agent} 20.01 --db good.db".split()
    assert "does not suffice" in refusal(words, monkeypatch, capsys)
    words = ["escrow", "withdraw-fees", "0.01", "--reference", "line-2", "--db", "good.db"]
    assert "the fees come to 0.00" in refusal(words, monkeypatch, capsys)
    assert "is revoked" in run(f"agent revoke {agent}")
    assert "the books balance" in run("check")

"""The escrow as a process: the command line, clean ends, and SIGKILL in mid-run."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.escrow.market import joined
from tests.support.escrow import EscrowProcess, escrow_process
from x402mw import cli
from x402mw.core.strict import b64url_decode
from x402mw.core.tokens import open_key_set

pytestmark = pytest.mark.anyio


async def test_killed_in_mid_run_and_asked_again(tmp_path: Path) -> None:
    """I13: after each SIGKILL the same keys give the first results; nothing twice, nothing lost."""
    with escrow_process(tmp_path) as process:
        async with joined(process) as m:
            name = (await m.open("20.00"))["escrow_id"]
            for round_number in range(5):
                await _one_round(process, m, name, round_number)
            process.check()
            end = await m.show(name)
            assert end["amount"] == "30.00"
            assert await m.balance(m.buyer) == "70.00"


async def _one_round(process: EscrowProcess, m, name: str, round_number: int) -> None:
    """Twenty top-ups of ten cents; the process dies at some moment among them."""

    async def top_up(number: int) -> dict[str, object]:
        key = f"round {round_number} number {number}"
        while True:
            try:
                answer = await m.post(m.buyer, f"/escrow/{name}/topup", {"amount": "0.10"}, key=key)
            except httpx.TransportError:
                await asyncio.sleep(0.02)
                continue
            if answer.status_code == 200:
                return dict(answer.json())
            assert answer.status_code in (409, 503), answer.text
            await asyncio.sleep(0.02)

    async def kill() -> None:
        await asyncio.sleep(0.01 + 0.015 * round_number)
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
        process.deposit(settings["X402MW_AGENT"], "25.50")
        assert process.command("escrow", "check", "--db", process.db).startswith("the books")


def test_rotation_reaches_a_running_service(tmp_path: Path) -> None:
    """Keys: the operator's command rotates the key of a service that goes on running."""
    with escrow_process(tmp_path) as process:
        process.command("escrow", "rotate-key", "--db", process.db)
        answer = httpx.get(f"{process.url}/.well-known/x402mw-keys").json()
        keys = open_key_set(answer["key_set"], b64url_decode(process.root_key, 32))
        assert (keys.serial, len(keys.keys), len(keys.retired)) == (2, 2, 1)


def test_commands_refuse_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """House: a wrong command line ends with status 1 and one plain line, never a traceback."""
    lost = str(tmp_path / "lost.db")
    (tmp_path / "broken.db").write_text("this is no database, whatever its name says" * 100)
    broken = str(tmp_path / "broken.db")
    monkeypatch.setenv("X402MW_ROOT_KEY", "A" * 43)
    for arguments in (
        ("escrow", "check", "--db", lost),
        ("escrow", "check", "--db", broken),
        ("escrow", "check", "--db", "mysql://h/d"),
        ("escrow", "deposit", "--db", lost, "ag_" + "0" * 32, "1"),
        ("escrow", "deposit", "--db", lost, "ag_" + "0" * 32, "x"),
        ("escrow", "serve", "--db", str(tmp_path / "x.db"), "--host", "203.0.113.7"),
        ("escrow", "serve", "--db", broken, "--port", "0"),
        ("escrow", "serve", "--db", str(tmp_path / "x.db"), "--network", "Main!", "--port", "0"),
        ("register", "--escrow", "http://127.0.0.1:1", "x"),
    ):
        monkeypatch.setattr(sys, "argv", ["x402mw", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr().err
        assert ended.value.code == 1, (arguments, said)
        assert said.startswith("x402mw: "), said
        assert said.count("\n") == 1, said
    assert not Path(lost).exists()


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

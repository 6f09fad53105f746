"""Opening a session: whatever is cut off between locking money and saving its key, it is found."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.client.scripted import Clock
from tests.client.world import World
from x402mw.core.errors import EscrowRefused, EscrowUnavailable, LocalError
from x402mw_client.sessions import State

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the wallet file is; a lost answer is not asked for again at once."""
    monkeypatch.setattr("x402mw_client.operations.PAUSES_SECONDS", (0.0,))
    return tmp_path / "wallet.db"


def restart(world: World, path: Path) -> None:
    """A new process on the same file: the old one is gone without a word."""
    world.wallet._memory.close()
    world.connect(path=path)


async def lose_an_opening(world: World) -> None:
    """Money is locked, and the buyer does not hear of it."""
    world.escrow.script = [world.escrow.lose_answer]
    with pytest.raises(EscrowUnavailable):
        await world.get("/item/a")
    assert (len(world.escrow.sessions), world.wallet.summary().open_sessions) == (1, 0)


BUYER = """
    import json, os, signal, sys
    sys.path[:0] = [{root!r}, {client!r}]
    from tests.client.world import World
    world = World("sync")
    world.connect(path={path!r})
    def die(answer):
        with open({escrow!r}, "w") as file:
            json.dump([world.escrow.sessions, world.escrow.stored, world.escrow.balance], file)
        os.kill(os.getpid(), signal.SIGKILL)
    world.escrow.script = [die]
    world.http.get("http://127.0.0.1:8402/item/a")
"""


def run_buyer(path: Path, escrow: Path) -> int:
    """Runs a buyer in a process of its own to its sudden end."""
    code = textwrap.dedent(BUYER).format(
        root=str(ROOT), client=str(ROOT / "client"), path=str(path), escrow=str(escrow)
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode


async def test_killed_between_the_lock_and_the_save(
    world: World, path: Path, tmp_path: Path
) -> None:
    """After SIGKILL at that very moment the next process finds the session, and pays from it."""
    found = tmp_path / "escrow.json"
    assert run_buyer(path, found) == -signal.SIGKILL
    escrow = world.escrow
    escrow.sessions, escrow.stored, escrow.balance = json.loads(found.read_text())
    locked = escrow.balance
    world.connect(path=path)
    assert (await world.get("/item/a")).text == "ran 1"
    assert (len(escrow.sessions), escrow.balance) == (1, locked)
    restart(world, path)
    assert (await world.get("/item/a")).text == "ran 2"
    assert (len(escrow.sessions), world.money()) == (1, (2000, 0))


@pytest.mark.parametrize("later", [1, 700])
async def test_a_lost_answer_is_found_again(world: World, path: Path, later: int) -> None:
    """The next opening sends the same request, and renews a token that is old by then."""
    world.connect(path=path)
    await lose_an_opening(world)
    restart(world, path)
    world.clock.now += later
    assert (await world.get("/item/a")).text == "ran 1"
    assert len(world.escrow.sessions) == 1


async def test_a_lost_answer_is_found_in_ram(world: World, path: Path) -> None:
    """A wallet without a file finds it too, for as long as it lives."""
    await lose_an_opening(world)
    assert (await world.get("/item/a")).text == "ran 1"
    assert len(world.escrow.sessions) == 1


async def test_closing_finds_it_too(world: World, path: Path) -> None:
    """A wallet that is closed leaves no money behind that it may have locked."""
    world.connect(path=path)
    await lose_an_opening(world)
    restart(world, path)
    await world.close()
    assert world.session.state is State.CLOSED
    assert (len(world.escrow.sessions), len(world.provider.accounts)) == (1, 1)


async def test_a_session_found_too_late(world: World, path: Path) -> None:
    """If it has ended meanwhile another one is opened."""
    world.connect(path=path)
    await lose_an_opening(world)
    restart(world, path)
    for session in world.escrow.sessions.values():
        session["status"] = "closing"
    world.clock.now += 700
    assert (await world.get("/item/a")).text == "ran 1"
    assert len(world.escrow.sessions) == 2


async def test_a_refusal_ends_an_opening(world: World, path: Path) -> None:
    """What the escrow refused is not asked for again; what it did not look at is."""
    world.connect(path=path)
    world.escrow.balance = 5000
    with pytest.raises(EscrowRefused):
        await world.get("/item/a")
    assert not world.wallet.state.purse.openings
    world.escrow.balance = 1_000_000
    problem = {"type": "urn:x402mw:problem:rate_limit", "code": "rate_limit"}
    world.escrow.script = [lambda answer: httpx.Response(429, json=problem)]
    with pytest.raises(EscrowRefused):
        await world.get("/item/a")
    restart(world, path)
    assert (await world.get("/item/a")).text == "ran 1"
    assert len(world.escrow.sessions) == 1


async def test_a_refusal_is_told_with_the_disk_full(
    world: World, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be forgotten in the file does not hide what the escrow said."""
    world.connect(path=path)
    world.escrow.balance = 5000

    def full(*given: Any) -> None:
        raise sqlite3.OperationalError("disk full")

    monkeypatch.setattr(world.wallet._memory, "drop", full)
    with pytest.raises(EscrowRefused):
        await world.get("/item/a")


async def test_an_opening_is_not_a_lost_session(world: World, path: Path) -> None:
    """Closing lost sessions spares one whose key is on file, or is about to be."""
    world.connect(path=path)
    await lose_an_opening(world)
    wallet = world.wallet
    if world.kind == "async":
        assert await wallet.close_lost_sessions() == 0
    else:
        assert wallet.close_lost_sessions_sync() == 0
    assert (await world.get("/item/a")).text == "ran 1"
    assert len(world.escrow.sessions) == 1


async def test_clocks_that_differ_lock_no_pile_of_deposits(world: World) -> None:
    """A session that is over as soon as it is opened is not followed by another one."""
    world.escrow.clock = Clock(world.clock.now - 3100)
    with pytest.raises(LocalError, match="clock"):
        await world.get("/item/a")
    assert len(world.escrow.sessions) == 1


async def test_what_cannot_be_remembered_is_not_locked(
    world: World, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the disk full no money is locked."""
    world.connect(path=path)

    def full(*given: Any) -> None:
        raise sqlite3.OperationalError("disk full")

    monkeypatch.setattr(world.wallet._memory, "begin", full)
    with pytest.raises(LocalError, match="cannot be written"):
        await world.get("/item/a")
    assert not world.escrow.sessions


async def test_the_request_is_in_the_file_before_it_leaves(world: World, path: Path) -> None:
    """When the escrow is asked, the file has seed and key; afterwards it has the session."""
    world.connect(path=path)
    seen: list[int] = []
    memory = world.wallet._memory._db
    assert memory is not None

    def look(answer: httpx.Response) -> httpx.Response:
        seen.append(memory.execute("SELECT count(*) FROM openings").fetchone()[0])
        assert not memory.in_transaction
        return answer

    world.escrow.script = [look]
    await world.get("/item/a")
    assert seen == [1]
    assert memory.execute("SELECT count(*) FROM openings").fetchone() == (0,)
    assert os.stat(path).st_mode & 0o777 == 0o600

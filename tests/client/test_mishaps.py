"""What happens around a wallet that it did not ask for: links, forks, hooks, answers overtaken."""

import asyncio
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from tests.client.scripted_escrow import ScriptedEscrow
from tests.client.test_shared import SUBJECT, end, partner, sign, stuck
from tests.client.world import LIMITS, World
from x402mw.core.errors import ConfigurationError, EscrowRefused, EscrowUnavailable
from x402mw_client import walletfile
from x402mw_client.locks import Locks
from x402mw_client.sessions import Stale, State

pytestmark = pytest.mark.anyio


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the wallet file is."""
    return tmp_path / "wallet.db"


def in_a_fork(work: Callable[[], object]) -> None:
    """Does something in a forked copy of this process."""
    with warnings.catch_warnings():
        # Some of pytest's plugins have threads; the copy does nothing with them.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def reach_escrow_by(world: World, answer: Callable[[httpx.Request], httpx.Response]) -> None:
    """Puts something of a test's own between the wallet and its escrow."""
    clients: Any = {"async": httpx.AsyncClient, "sync": httpx.Client}
    inner = httpx.MockTransport(answer)
    world.transport._escrow._client = clients[world.kind](transport=inner)


async def test_a_renewal_that_a_top_up_overtook(world: World) -> None:
    """The token of a top-up is not given up for one from before it: its cover would be missing."""
    await world.get("/item/a")
    session, (found,) = world.session, world.escrow.sessions.values()
    renewed = world.escrow.token(found)
    found["deposit"] += 100_000
    topped_up = world.escrow.token(found)
    for token in (topped_up, renewed):
        record: Any = SimpleNamespace(
            token=token, deposit=found["deposit"], expires_at=session.expires_at
        )
        world.wallet.state.purse.renew(session, record)
    for _ in range(150):
        assert (await world.get("/item/a")).status_code == 200
    assert session.state is State.OPEN


async def test_a_lost_top_up_locks_nothing_twice(world: World) -> None:
    """While answers of top-ups are lost the same one is sent again, not one more each time."""
    await world.get("/item/a")
    stored: dict[str, httpx.Response] = {}
    losing = True

    def losses(request: httpx.Request) -> httpx.Response:
        if not request.url.path.endswith("/topup"):
            return world.escrow(request)
        key = request.headers["Idempotency-Key"]
        if key not in stored:
            stored[key] = world.escrow(request)
        if losing:
            raise httpx.ReadError("lost")
        return stored[key]

    reach_escrow_by(world, losses)
    while world.session.rest:
        world.clock.now += 5
        await world.get("/item/a")
    for _ in range(2):
        with pytest.raises(EscrowUnavailable):
            await world.get("/item/a")
    assert len(stored) == 1
    losing = False
    assert (await world.get("/item/a")).status_code == 200
    assert world.session.deposit < 200_000
    assert not world.wallet.state.topups


async def test_a_refused_top_up_is_not_sent_again(world: World) -> None:
    """Also the smaller one: under its old key the escrow would refuse it whatever there is now."""
    world.connect(deposit="0.01")
    world.escrow.balance = 15_000
    for _ in range(10):
        await world.get("/item/a")
    stored: dict[str, httpx.Response] = {}

    def spent_elsewhere(request: httpx.Request) -> httpx.Response:
        key = request.headers["Idempotency-Key"]
        if key not in stored:
            stored[key] = world.escrow(request)
            world.escrow.balance = 500
        return stored[key]

    reach_escrow_by(world, spent_elsewhere)
    with pytest.raises(EscrowRefused):
        await world.get("/item/a")
    assert len(stored) == 2
    world.escrow.balance = 10_000
    assert (await world.get("/item/a")).status_code == 200
    assert world.session.deposit == 20_000


async def test_a_hook_that_fails_keeps_no_answer_back(world: World) -> None:
    """`on_payment` may fail: the call was paid, so its caller is given the answer."""

    def fail(paid: Any) -> None:
        raise ValueError("the owner's mistake")

    world.connect(LIMITS, on_payment=fail)
    assert (await world.get("/item/a")).text == "ran 1"
    assert world.money() == (1000, 0)


async def test_opening_waits_for_a_change(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wallet that is opened while another process changes the file waits, within bounds."""
    world = World("async")
    world.connect(path=path)
    await world.get("/item/a")
    hold = stuck(path)
    hold.__enter__()
    later = threading.Timer(0.3, hold.__exit__, (None, None, None))
    later.start()
    assert partner(world, path=path).money() == (1000, 0)
    later.join()
    monkeypatch.setattr(walletfile, "OPEN_SECONDS", 0.05)
    with stuck(path), pytest.raises(ConfigurationError, match="another process"):
        partner(world, path=path)


async def test_a_link_leads_to_the_same_wallet(path: Path) -> None:
    """Processes that reach one file by different names know each other."""
    world = World("async")
    world.connect(path=path)
    await world.get("/item/a")
    sign(world, world.session)
    link = path.with_name("link.db")
    link.symlink_to(path)
    other = partner(world, path=link)
    other.wallet.state.purse.recover()
    assert not other.session.doubtful


async def test_forgotten_by_another_process(path: Path) -> None:
    """A story that was about to sign in a session does not, once others closed and forgot it."""
    world = World("async")
    world.connect(path=path)
    other = partner(world, path=path)
    await world.get("/item/a")
    session, purse = other.session, world.wallet.state.purse
    purse.close(world.session, 1000)
    await world.get("/item/a")
    assert session.id not in purse.sessions
    with pytest.raises(Stale):
        other.wallet.state.purse.sign(session, session.offer, SUBJECT, None)
    row = (session.id, 7, "", 1000, 0, None)
    other.wallet._memory._db.execute("INSERT INTO calls VALUES (?, ?, ?, ?, ?, ?)", row)  # type: ignore[attr-defined] # a wallet file
    assert partner(world, path=path).money() == (1000, 0)


async def test_who_opens_a_session_is_back(path: Path) -> None:
    """Who ended, and then opens a session after all, is not closed by the next one that ends."""
    world = World("async")
    world.connect(path=path)
    other = partner(world, path=path)
    await end(other)
    opened, leave = asyncio.Event(), asyncio.Event()

    async def slow(request: httpx.Request) -> httpx.Response:
        answer = world.escrow(request)
        if request.url.path == "/api/v1/escrow":
            opened.set()
            await leave.wait()
        return answer

    client = httpx.AsyncClient(transport=httpx.MockTransport(slow))
    other.transport._escrow._client = client
    calling = asyncio.create_task(other.get("/item/a"))
    await opened.wait()
    await end(world)
    leave.set()
    assert (await calling).status_code == 200
    assert [found["status"] for found in world.escrow.sessions.values()] == ["locked"]


async def test_calls_of_who_is_not_listed(path: Path) -> None:
    """A process that vanished from the list of processes leaves no call that nobody asks about."""
    world = World("async")
    world.connect(path=path)
    await world.get("/item/a")
    sign(world, world.session)
    world.wallet._memory._db.execute("DELETE FROM processes")  # type: ignore[attr-defined] # a wallet file
    world.wallet._memory.close()
    assert partner(world, path=path).session.doubtful


async def test_lock_files_of_the_dead_go(path: Path) -> None:
    """Who closes a wallet deletes the lock files that dead processes left, and no others."""
    first, second = Locks(path), Locks(path)
    assert first.take("living")
    (path.parent / f"{path.name}.0123456789abcdef.lock").touch()
    second.close()
    assert [lock.name for lock in path.parent.glob("*.lock")] == [Path(first._file("living")).name]
    assert not second.take("living")
    first.close()
    assert not list(path.parent.glob("*.lock"))


async def test_lock_files_that_were_deleted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who deletes the lock files takes their protection away, and no answer."""
    world = World("async")
    world.connect(path=path)
    honest = ScriptedEscrow._open

    def delete(escrow: ScriptedEscrow, body: dict[str, Any]) -> Any:
        for lock in path.parent.glob("*.lock"):
            lock.unlink()
        return honest(escrow, body)

    monkeypatch.setattr(ScriptedEscrow, "_open", delete)
    assert (await world.get("/item/a")).status_code == 200


def test_a_forked_copy_ends_nothing(path: Path) -> None:
    """A forked copy that closes its client or wallet takes neither sessions nor locks away."""
    world = World("sync")
    world.connect(path=path)
    world.http.get("http://127.0.0.1:8402/item/a")
    other = partner(world, path=path)
    sign(world, world.session)
    in_a_fork(world.http.close)
    in_a_fork(world.wallet.close)
    other.wallet.state.purse.recover()
    assert not other.session.doubtful
    other.wallet._memory.close()
    in_a_fork(world.http.close)
    assert world.session.state is State.OPEN

"""What a wallet file remembers: over restarts, kills, rollbacks and second processes."""

import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.client.scripted import ESCROW, sent_payment, sent_voucher
from tests.client.world import LIMITS, World, many
from tests.support import payments as p
from x402mw.core.errors import (
    ConfigurationError,
    LimitExceeded,
    LocalError,
    PaymentOutcomeUnknown,
)
from x402mw.core.strict import b64url_encode
from x402mw_client import Wallet, schema
from x402mw_client.flow import PAYMENT
from x402mw_client.sessions import State

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the wallet file is."""
    return tmp_path / "wallet.db"


def restart(world: World, path: Path) -> None:
    """A new process on the same file: the old one is gone without a word."""
    world.wallet._memory.close()
    world.connect(path=path)


async def test_a_restart_goes_on_where_it_was(world: World, path: Path) -> None:
    """Session, totals and token come back; no second session is opened, nothing is paid twice."""
    world.connect(path=path)
    await world.get("/item/a")
    assert world.session.expires_at == world.clock.now + 86_400
    restart(world, path)
    assert world.money() == (1000, 0)
    await world.get("/item/b")
    assert len(world.escrow.sessions) == 1
    assert [sent_voucher(r).voucher.cumulative for r in world.signed] == [1000, 2000]
    assert world.money() == (2000, 0)


async def test_an_unknown_call_stays_held_over_a_restart(world: World, path: Path) -> None:
    """What was lost stays held; it is learnt by control when room is needed."""
    world.connect(path=path)
    world.provider.script = [world.provider.lose_answer] * 4
    with pytest.raises(PaymentOutcomeUnknown):
        await world.get("/item/a")
    world.wallet._memory.close()
    world.connect(limits=p.replace(LIMITS, total="0.0015"), path=path)
    assert world.money() == (0, 1000)
    with pytest.raises(Exception, match="total"):
        await world.get("/item/b")
    assert world.money() == (1000, 0)


async def test_the_file_is_private(world: World, path: Path) -> None:
    """The file holds signing keys: mode 0600, also if it was open to others before."""
    os.close(os.open(path, os.O_CREAT, 0o644))
    world.connect(path=path)
    await world.get("/item/a")
    for file in os.scandir(path.parent):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def open_wallet(path: Path, **more: Any) -> Wallet:
    """A wallet on a file, without anything behind it."""
    return Wallet(**{"escrow": ESCROW, "api_key": "k", "limits": LIMITS, "path": path} | more)


def test_an_older_program_is_not_disturbed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that a program of version 1 has for itself is refused, with that guess."""
    monkeypatch.setattr(schema, "OPEN_SECONDS", 0.1)
    older = sqlite3.connect(path)
    older.execute("PRAGMA locking_mode = EXCLUSIVE")
    older.execute("PRAGMA journal_mode = WAL")
    older.execute("CREATE TABLE settings (name)")
    with pytest.raises(ConfigurationError, match="older version"):
        open_wallet(path)
    older.close()


def test_what_is_no_wallet_file_is_refused(path: Path) -> None:
    """Damaged, foreign and newer files are refused when opening, with a reason."""
    path.write_bytes(b"x" * 5000)
    with pytest.raises(ConfigurationError, match="no usable wallet file"):
        open_wallet(path)
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 9")
    db.close()
    with pytest.raises(ConfigurationError, match="newer"):
        open_wallet(path)


async def test_a_changed_offer_is_refused(world: World, path: Path) -> None:
    """Terms in the file that are not what they were are the file's fault, not a provider's."""
    world.connect(path=path)
    await world.get("/item/a")
    world.wallet._memory.close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE sessions SET offer = replace(offer, '1000', '1001')")
    db.close()
    with pytest.raises(ConfigurationError, match="wallet file is damaged"):
        world.connect(path=path)


VERSION_1 = """
DROP TABLE processes;
CREATE TABLE old (
  session BLOB NOT NULL REFERENCES sessions (id), seq INTEGER NOT NULL, url TEXT NOT NULL,
  hold INTEGER NOT NULL, expires INTEGER NOT NULL, PRIMARY KEY (session, seq)
) STRICT;
INSERT INTO old SELECT session, seq, url, hold, expires FROM calls;
DROP TABLE calls;
ALTER TABLE old RENAME TO calls;
ALTER TABLE sessions DROP COLUMN held;
ALTER TABLE sessions DROP COLUMN proven;
ALTER TABLE sessions DROP COLUMN unreceipted;
ALTER TABLE sessions DROP COLUMN receipt;
ALTER TABLE sessions DROP COLUMN change;
PRAGMA user_version = 1;
"""


async def test_a_file_of_version_1_is_taken_over(world: World, path: Path) -> None:
    """Sessions, totals and open calls of one process are kept, and shared from then on."""
    world.connect(path=path)
    await world.get("/item/a")
    world.provider.script = [world.provider.lose_answer] * 4
    with pytest.raises(PaymentOutcomeUnknown):
        await world.get("/item/a")
    world.wallet._memory.close()
    db = sqlite3.connect(path)
    db.executescript(VERSION_1)
    columns = db.execute("SELECT count(*) FROM pragma_table_info('sessions')").fetchone()
    db.close()
    assert columns == (13,)
    world.connect(limits=p.replace(LIMITS, total="0.0025"), path=path)
    other = world.wallet
    world.connect(limits=p.replace(LIMITS, total="0.0025"), path=path)
    assert world.money() == (1000, 1000)
    with pytest.raises(LimitExceeded):
        await world.get("/item/b")
    assert (world.money(), other.spent) == ((2000, 0), 2000)
    assert len(world.escrow.sessions) == 1


def test_a_cut_off_take_over_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it fails in the middle the file is what it was, and the next try succeeds."""
    open_wallet(path)._memory.close()
    db = sqlite3.connect(path)
    db.executescript(VERSION_1)
    before = list(db.iterdump())
    with monkeypatch.context() as patched:
        broken = schema._CHANGES[1] + "SELECT nonsense FROM nowhere;"
        patched.setitem(schema._CHANGES, 1, broken)
        with pytest.raises(ConfigurationError):
            open_wallet(path)
    assert list(db.iterdump()) == before
    assert db.execute("PRAGMA user_version").fetchone() == (1,)
    db.close()
    open_wallet(path)._memory.close()


async def test_the_file_belongs_to_one_escrow(world: World, path: Path) -> None:
    """A file that was used with one escrow is refused with another, or another root key."""
    world.connect(path=path)
    await world.get("/item/a")
    world.wallet._memory.close()
    for other in (
        {"escrow": "http://127.0.0.1:1"},
        {"escrow_root": b64url_encode(p.SIGNER_KEY)},
    ):
        with pytest.raises(ConfigurationError, match="another escrow"):
            open_wallet(path, **other)


async def test_the_pin_outlives_the_process(world: World, path: Path) -> None:
    """A root key that was pinned once is not replaced by whoever answers later."""
    world.connect(path=path)
    await world.get("/item/a")
    restart(world, path)
    world.escrow.root = p.SIGNER
    assert (await world.get("/item/b")).text == "ran 2"
    assert world.escrow.count("/x402mw-keys") == 1


async def test_a_rolled_back_file_is_mended(world: World, path: Path, tmp_path: Path) -> None:
    """A restored copy of the file adopts the newer voucher that the provider shows, and goes on."""
    world.connect(path=path)
    await world.get("/item/a")
    world.wallet._memory.close()
    copy = tmp_path / "copy.db"
    shutil.copy(path, copy)
    world.connect(path=path)
    for _ in range(3):
        await world.get("/item/a")
    world.wallet._memory.close()
    world.connect(path=copy)
    assert (await world.get("/item/a")).text == "ran 5"
    assert (world.money(), world.session.state) == ((5000, 0), State.OPEN)


async def test_a_rolled_back_file_is_mended_under_load(
    world: World, path: Path, tmp_path: Path
) -> None:
    """After a restart one call alone finds out what is missing; the others wait for it."""
    world.connect(path=path)
    await world.get("/item/a")
    world.wallet._memory.close()
    copy = tmp_path / "copy.db"
    shutil.copy(path, copy)
    world.connect(path=path)
    for _ in range(3):
        await world.get("/item/a")
    world.wallet._memory.close()
    world.connect(path=copy)
    answers = await many(world, ["/item/a"] * 20)
    assert {answer.status_code for answer in answers} == {200}
    assert (world.money(), world.session.state) == ((24_000, 0), State.OPEN)


async def test_the_total_is_in_the_file_before_the_voucher_leaves(world: World, path: Path) -> None:
    """When a voucher arrives anywhere, the file already knows of it."""
    world.connect(path=path)
    honest = world.provider.honest
    seen: list[tuple[int, int]] = []

    def look(request: httpx.Request) -> httpx.Response:
        if "PAYMENT-SIGNATURE" in request.headers:
            memory = world.wallet._memory._db
            assert memory is not None
            seen.append(
                memory.execute(
                    "SELECT s.cumulative, c.seq FROM sessions s JOIN calls c ON c.session = s.id"
                ).fetchone()
            )
            assert not memory.in_transaction
        return honest(request)

    world.provider.honest = look  # type: ignore[method-assign]
    await world.get("/item/a")
    voucher = sent_voucher(world.signed[0]).voucher
    assert seen == [(voucher.cumulative, voucher.seq)]


async def test_an_answer_is_not_lost_with_the_disk(
    world: World, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If only the charge cannot be written the caller has its answer, and the file the hold."""
    world.connect(path=path)
    await world.get("/item/a")

    def full(*given: Any) -> None:
        raise sqlite3.OperationalError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(world.wallet._memory, "drop", full)
        answer = await world.get("/item/a")
    assert (answer.text, answer.extensions[PAYMENT].charge) == ("ran 2", 1000)
    assert "cannot be written" in caplog.text
    assert world.money() == (1000, 1000)
    await world.get("/item/a")
    assert world.money() == (3000, 0)
    restart(world, path)
    assert world.money() == (3000, 0)


async def test_a_file_that_cannot_be_written_signs_nothing(
    world: World, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be remembered is not signed."""
    world.connect(path=path)
    await world.get("/item/a")

    def full(*given: Any, **named: Any) -> None:
        raise sqlite3.OperationalError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(world.wallet._memory, "save", full)
        with pytest.raises(LocalError, match="cannot be written"):
            await world.get("/item/a")
    assert (len(world.signed), world.money()) == (1, (1000, 0))
    assert (await world.get("/item/a")).text == "ran 2"


BUYER = """
    import sys, httpx
    sys.path[:0] = [{root!r}, {client!r}]
    from tests.client.world import World
    world = World("sync")
    world.connect(path={path!r})
    real = world.provider.honest
    def tell(request):
        if "PAYMENT-SIGNATURE" in request.headers:
            print(request.headers["PAYMENT-SIGNATURE"], flush=True)
        return real(request)
    world.provider.honest = tell
    while True:
        world.http.get("http://127.0.0.1:8402/item/a")
"""


def test_kill_nine(path: Path) -> None:
    """After SIGKILL at any moment the file knows every voucher that left, and still opens."""
    code = textwrap.dedent(BUYER).format(
        root=str(ROOT), client=str(ROOT / "client"), path=str(path)
    )
    for lines in (1, 7, 40):
        path.unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None
        sent = [process.stdout.readline() for _ in range(lines)]
        os.kill(process.pid, signal.SIGKILL)
        sent += process.stdout.readlines()
        process.wait()
        process.stdout.close()
        vouchers = [_voucher(line.strip().decode()) for line in sent if line.endswith(b"\n")]
        world = World("sync")
        world.connect(path=path)
        assert world.session.cumulative >= max(voucher.cumulative for voucher in vouchers)
        charged, held = world.money()
        assert charged + held >= 1000 * len(vouchers)
        world.wallet._memory.close()


def _voucher(header: str) -> Any:
    request = httpx.Request("GET", ESCROW, headers={"PAYMENT-SIGNATURE": header})
    assert sent_payment(request)
    return sent_voucher(request).voucher

"""Damage in the write-ahead log of a SQLite file is told from the torn end of a write."""

import shutil
import sqlite3
from pathlib import Path

import pytest

from x402mw.core.errors import ConfigurationError
from x402mw.escrow.database import check_log
from x402mw.provider.journal import Journal, JournalCorrupt
from x402mw.sqlite_log import lost_commits

COMMITS = 6
HEADER, FRAME = 32, 24 + 4096


def copy_killed(path: Path, copy: Path) -> None:
    """Copies an open database and its log, as a kill would leave them."""
    for end in ("", "-wal"):
        shutil.copy(f"{path}{end}", f"{copy}{end}")


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A database as a killed process left it: one table and six commits, all in the log."""
    first, left = tmp_path / "first.db", tmp_path / "left.db"
    connection = sqlite3.connect(first, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY)")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for number in range(COMMITS):
        connection.execute("INSERT INTO t VALUES (?)", (number,))
    copy_killed(first, left)
    connection.close()
    return left


def change(database: Path, place: int) -> None:
    """Turns one bit of the log around."""
    log = Path(f"{database}-wal")
    content = bytearray(log.read_bytes())
    content[place] ^= 1
    log.write_bytes(content)


def rows(database: Path) -> int:
    """How many commits SQLite finds."""
    connection = sqlite3.connect(database)
    (found,) = connection.execute("SELECT count(*) FROM t").fetchone()
    connection.close()
    return int(found)


def test_a_sound_log_has_lost_nothing(killed: Path) -> None:
    """What SQLite would read whole is not called damaged; a file without a log neither."""
    assert lost_commits(str(killed)) == 0
    assert rows(killed) == COMMITS
    assert lost_commits(str(killed)) == 0


@pytest.mark.parametrize("frame", range(COMMITS))
@pytest.mark.parametrize("place", [0, 5, 17, 24, 2000, FRAME - 1])
def test_damage_loses_what_is_behind_it(killed: Path, frame: int, place: int) -> None:
    """A changed frame is found, and so many commits are called lost as SQLite passes over."""
    change(killed, HEADER + frame * FRAME + place)
    lost = lost_commits(str(killed))
    assert lost == COMMITS - frame
    assert rows(killed) == COMMITS - lost


@pytest.mark.parametrize("place", [0, 6, 26])
def test_a_damaged_header_loses_all(killed: Path, place: int) -> None:
    """A log whose header is broken is passed over whole, and that is told."""
    change(killed, place)
    assert lost_commits(str(killed)) == COMMITS
    assert rows(killed) == 0


def test_a_torn_end_is_no_damage(killed: Path) -> None:
    """A log cut off anywhere has only lost what was never acknowledged."""
    log = Path(f"{killed}-wal")
    content = log.read_bytes()
    for length in range(0, len(content), 509):
        log.write_bytes(content[:length])
        assert lost_commits(str(killed)) == 0


def test_the_last_log_is_not_mistaken(tmp_path: Path) -> None:
    """Frames of a former round of the same log are no commits of this one."""
    path = tmp_path / "round.db"
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY)")
    for number in range(20):
        connection.execute("INSERT INTO t VALUES (?)", (number,))
    connection.execute("PRAGMA wal_checkpoint(RESTART)")
    connection.execute("INSERT INTO t VALUES (99)")
    assert lost_commits(str(path)) == 0
    connection.close()


def test_a_journal_that_lost_commits_is_refused(tmp_path: Path) -> None:
    """The provider refuses a journal that forgot what it acknowledged, and keeps the evidence."""
    path, left = tmp_path / "journal.db", tmp_path / "left.db"
    journal = Journal.open(str(path))
    other = sqlite3.connect(path, isolation_level=None)
    for number in range(3):
        other.execute("INSERT INTO settings VALUES (?, '')", (str(number),))
    copy_killed(path, left)
    other.close()
    journal.close()
    sound = Path(f"{left}-wal").read_bytes()
    change(left, HEADER + 30)
    with pytest.raises(JournalCorrupt, match="commits are lost"):
        Journal.open(str(left))
    Path(f"{left}-wal").write_bytes(sound)
    Journal.open(str(left)).close()


def test_an_escrow_that_lost_commits_is_refused(killed: Path) -> None:
    """The escrow refuses to serve from a database that forgot what it acknowledged."""
    change(killed, HEADER + 30)
    with pytest.raises(ConfigurationError, match="its last 6 commits are lost"):
        check_log(str(killed))

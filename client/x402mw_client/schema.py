"""The wallet file as such: its tables, its version, and how it is opened.

Version 1 belonged to one process at a time; such a file is taken over as it is found, in one
transaction. A program that knows only version 1 refuses the file from then on.
"""

import os
import sqlite3
import time

from x402mw.core.errors import ConfigurationError
from x402mw_client.locks import OWNER_ONLY, Locks

VERSION = 2
OPEN_SECONDS = 5.0
_SPIN_SECONDS = 0.01
_OPENING = "opening"
# A call without a process is nobody's: whoever needs to know asks what became of it.
_CALLS = """
CREATE TABLE calls (
  session BLOB NOT NULL REFERENCES sessions (id), seq INTEGER NOT NULL, url TEXT NOT NULL,
  hold INTEGER NOT NULL, expires INTEGER NOT NULL, process TEXT, PRIMARY KEY (session, seq)
) STRICT, WITHOUT ROWID;
"""
_PROCESSES = "CREATE TABLE processes (name TEXT PRIMARY KEY, staying INTEGER NOT NULL) STRICT;"
_NEW = f"""
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE sessions (
  id BLOB PRIMARY KEY, origin TEXT NOT NULL, offer TEXT NOT NULL, seed BLOB NOT NULL,
  token TEXT NOT NULL, target INTEGER NOT NULL, deposit INTEGER NOT NULL,
  expires_at INTEGER NOT NULL,
  cumulative INTEGER NOT NULL, charged INTEGER NOT NULL, unattributed INTEGER NOT NULL,
  total_seen INTEGER NOT NULL, state TEXT NOT NULL,
  held INTEGER NOT NULL DEFAULT 0, proven INTEGER NOT NULL DEFAULT 0,
  unreceipted INTEGER NOT NULL DEFAULT 0, receipt TEXT NOT NULL DEFAULT '',
  change INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE openings (
  key TEXT PRIMARY KEY, origin TEXT NOT NULL, offer TEXT NOT NULL, seed BLOB NOT NULL,
  amount INTEGER NOT NULL, target INTEGER NOT NULL, seconds INTEGER
) STRICT;
{_CALLS}
{_PROCESSES}
"""
_FROM_VERSION_1 = f"""
ALTER TABLE sessions ADD COLUMN held INTEGER NOT NULL DEFAULT 0;
ALTER TABLE sessions ADD COLUMN proven INTEGER NOT NULL DEFAULT 0;
ALTER TABLE sessions ADD COLUMN unreceipted INTEGER NOT NULL DEFAULT 0;
ALTER TABLE sessions ADD COLUMN receipt TEXT NOT NULL DEFAULT '';
ALTER TABLE sessions ADD COLUMN change INTEGER NOT NULL DEFAULT 0;
ALTER TABLE calls RENAME TO old_calls;
{_CALLS}
INSERT INTO calls SELECT session, seq, url, hold, expires, NULL FROM old_calls;
DROP TABLE old_calls;
UPDATE sessions SET held = unattributed + coalesce(
  (SELECT sum(hold) FROM calls WHERE calls.session = sessions.id), 0);
{_PROCESSES}
"""  # noqa: S608 (constants)
_CHANGES = {0: _NEW, 1: _FROM_VERSION_1}


def open_file(path: str | os.PathLike[str], locks: Locks) -> sqlite3.Connection:
    """Opens, makes or brings up to date a wallet file, or raises `ConfigurationError`."""
    _make(path)
    _enter(locks)
    try:
        db = sqlite3.connect(path, check_same_thread=False, timeout=OPEN_SECONDS)
        db.isolation_level = None
        try:
            _prepare(db, path)
        except BaseException:
            db.close()
            raise
    except sqlite3.DatabaseError as error:
        raise _refusal(path, error) from None
    finally:
        locks.release(_OPENING)
    return db


def _make(path: str | os.PathLike[str]) -> None:
    """The file holds signing keys, so nobody else may read it, not even for a moment."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, OWNER_ONLY))
    except FileExistsError:
        os.chmod(path, OWNER_ONLY)


def _enter(locks: Locks) -> None:
    deadline = time.monotonic() + OPEN_SECONDS
    while not locks.take(_OPENING):
        if time.monotonic() > deadline:
            raise ConfigurationError("another process is stuck while it opens the wallet file")
        time.sleep(_SPIN_SECONDS)


def _prepare(db: sqlite3.Connection, path: str | os.PathLike[str]) -> None:
    db.execute("PRAGMA journal_mode = WAL")
    # Commits survive the end of the process; a power loss is mended by the provider's word.
    db.execute("PRAGMA synchronous = NORMAL")
    if db.execute("PRAGMA quick_check").fetchone() != ("ok",):
        raise sqlite3.DatabaseError("the file is damaged")
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version not in (*_CHANGES, VERSION):
        raise ConfigurationError(f"the wallet file {os.fspath(path)!r} is of a newer version")
    if version != VERSION:
        db.executescript(
            f"BEGIN IMMEDIATE; {_CHANGES[version]} PRAGMA user_version = {VERSION}; COMMIT;"
        )
    # From here on nobody waits inside SQLite: a transaction has its own patience.
    db.execute("PRAGMA busy_timeout = 0")


def _refusal(path: str | os.PathLike[str], error: sqlite3.DatabaseError) -> ConfigurationError:
    if isinstance(error, sqlite3.OperationalError):
        return ConfigurationError(
            f"the wallet file {os.fspath(path)!r} cannot be opened ({error});"
            " is an older version of this program using it?"
        )
    return ConfigurationError(f"{os.fspath(path)!r} is no usable wallet file: {error}")

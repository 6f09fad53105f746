"""Where a wallet keeps what it remembers: in RAM, or in one SQLite file of mode 0600.

The objects of `sessions` are the truth while a process lives; the file follows them, in one
transaction per change, and always *before* a voucher leaves. The file is locked for as long as it
is open, so two processes never sign from one memory.
"""

import json
import os
import sqlite3
from collections.abc import Callable, Iterable

from x402mw.core.amounts import Atomic
from x402mw.core.errors import ConfigurationError
from x402mw_client.sessions import Call, Offer, Opening, Session, State, as_text

_SCHEMA = """
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS sessions (
  id BLOB PRIMARY KEY, origin TEXT NOT NULL, offer TEXT NOT NULL, seed BLOB NOT NULL,
  token TEXT NOT NULL, target INTEGER NOT NULL, deposit INTEGER NOT NULL,
  expires_at INTEGER NOT NULL,
  cumulative INTEGER NOT NULL, charged INTEGER NOT NULL, unattributed INTEGER NOT NULL,
  total_seen INTEGER NOT NULL, state TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS calls (
  session BLOB NOT NULL REFERENCES sessions (id), seq INTEGER NOT NULL, url TEXT NOT NULL,
  hold INTEGER NOT NULL, expires INTEGER NOT NULL, PRIMARY KEY (session, seq)
) STRICT;
CREATE TABLE IF NOT EXISTS openings (
  key TEXT PRIMARY KEY, origin TEXT NOT NULL, offer TEXT NOT NULL, seed BLOB NOT NULL,
  amount INTEGER NOT NULL, target INTEGER NOT NULL, seconds INTEGER
) STRICT;
"""
_DROP = "DELETE FROM openings WHERE key = ?"
_VERSION = 1
_COLUMNS = (
    "id, origin, offer, seed, token, target, deposit, expires_at, cumulative, charged,"
    " unattributed, total_seen, state"
)


class Memory:
    """A wallet's memory; `path` None keeps everything in RAM only."""

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        """Opens and locks the file, or raises `ConfigurationError` saying why it cannot."""
        self.path = path
        self.settings: dict[str, str] = {}
        self._db = None if path is None else _open(path)
        if self._db is not None:
            self.settings = dict(self._db.execute("SELECT name, value FROM settings"))

    def close(self) -> None:
        """Closes the file, if there is one."""
        if self._db is not None:
            # Kept as it is: what cannot be remembered any more must fail, not be forgotten.
            self._db.close()

    def set(self, name: str, value: str) -> None:
        """Remembers a setting."""
        self.settings[name] = value
        if self._db is not None:
            with self._db:
                self._db.execute("REPLACE INTO settings VALUES (?, ?)", (name, value))

    def load(self, read_offer: Callable[[dict[str, object]], Offer]) -> list[Session]:
        """Reads back every session with the calls that were open; nobody waits for those now."""
        if self._db is None:
            return []
        rows = self._db.execute(f"SELECT {_COLUMNS} FROM sessions")  # noqa: S608 (constant)
        sessions = {row[0]: _session(row, read_offer(json.loads(row[2]))) for row in rows}
        for found, seq, url, hold, expires in self._db.execute(
            "SELECT session, seq, url, hold, expires FROM calls"
        ):
            session = sessions[found]
            call = Call(session, seq, url, expires=expires, in_flight=False)
            session.hold(call, hold)
        return list(sessions.values())

    def load_openings(self, read_offer: Callable[[dict[str, object]], Offer]) -> list[Opening]:
        """Reads back the openings that were never finished."""
        if self._db is None:
            return []
        return [
            Opening(key, origin, read_offer(json.loads(offer)), *rest)
            for key, origin, offer, *rest in self._db.execute("SELECT * FROM openings")
        ]

    def begin(self, opening: Opening) -> None:
        """Writes an opening before it is sent."""
        if self._db is not None:
            of = opening
            row = (of.key, of.origin, as_text(of.offer), of.seed, of.amount, of.target, of.seconds)
            with self._db:
                self._db.execute("REPLACE INTO openings VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def drop(self, opening: Opening) -> None:
        """Forgets an opening that came to nothing."""
        if self._db is not None:
            with self._db:
                self._db.execute(_DROP, (opening.key,))

    def save(
        self,
        session: Session,
        *,
        opened: Call | None = None,
        dropped: Iterable[Call] = (),
        begun: Opening | None = None,
    ) -> None:
        """Writes a session as it stands: one call now open, others no longer, `begun` finished."""
        if self._db is None:
            return
        with self._db:
            if begun is not None:
                self._db.execute(_DROP, (begun.key,))
            marks = ", ".join("?" * 13)
            self._db.execute(f"REPLACE INTO sessions ({_COLUMNS}) VALUES ({marks})", _row(session))  # noqa: S608
            if opened is not None:
                row = (session.id, opened.seq, opened.url, opened.hold, opened.expires)
                self._db.execute("REPLACE INTO calls VALUES (?, ?, ?, ?, ?)", row)
            gone = [(session.id, call.seq) for call in dropped]
            self._db.executemany("DELETE FROM calls WHERE session = ? AND seq = ?", gone)


def _open(path: str | os.PathLike[str]) -> sqlite3.Connection:
    # The file holds signing keys, so nobody else may read it, not even for a moment.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    os.chmod(path, 0o600)
    db = sqlite3.connect(path, check_same_thread=False, timeout=0.2)
    try:
        # In exclusive mode SQLite keeps its lock on the file until the connection closes.
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA journal_mode = WAL")
        # Commits survive the end of the process; a power loss is mended by the provider's word.
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("BEGIN EXCLUSIVE")
        if db.execute("PRAGMA quick_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("the file is damaged")
        db.execute("COMMIT")
        _check_version(db, path)
        db.executescript(_SCHEMA)
    except sqlite3.OperationalError as error:
        db.close()
        raise ConfigurationError(
            f"the wallet file {os.fspath(path)!r} is in use by another process ({error});"
            " give each process a file of its own"
        ) from None
    except sqlite3.DatabaseError as error:
        db.close()
        raise ConfigurationError(f"{os.fspath(path)!r} is no usable wallet file: {error}") from None
    return db


def _check_version(db: sqlite3.Connection, path: str | os.PathLike[str]) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version not in (0, _VERSION):
        raise ConfigurationError(f"the wallet file {os.fspath(path)!r} is of a newer version")
    db.execute(f"PRAGMA user_version = {_VERSION}")


def _row(session: Session) -> tuple[object, ...]:
    return (
        session.id,
        session.origin,
        as_text(session.offer),
        session.seed,
        session.token,
        session.target,
        session.deposit,
        session.expires_at,
        session.cumulative,
        session.charged,
        session.unattributed,
        session.total_seen,
        session.state.value,
    )


def _session(row: tuple[object, ...], offer: Offer) -> Session:
    names = [name.strip() for name in _COLUMNS.split(",")]
    found = dict(zip(names, row, strict=True)) | {"offer": offer}
    found["state"] = State(str(found["state"]))
    session = Session(**found)  # type: ignore[arg-type]  # the columns have the fields' types
    session.held = Atomic(session.unattributed)
    session.proven = False
    return session

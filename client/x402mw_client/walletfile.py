"""A wallet's memory in one SQLite file of mode 0600, shared by the processes of one agent.

1. Each change is one write transaction, committed *before* a voucher leaves. A commit survives the
   end of the process; what must also survive a power cut is written through (`durable`).
2. Each row of a session carries the number of the change that wrote it, so that the others read
   only what is new to them.
3. Calls belong to a process, and a process that holds its lock is alive (`locks`): only the calls
   of dead ones are taken over.
"""

# ruff: noqa: D102 (what each method does is said in `Memory`)

import os
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter

from x402mw.core.amounts import Atomic
from x402mw.core.errors import ConfigurationError, X402mwError
from x402mw_client.locks import Locks
from x402mw_client.memory import Busy, Memory, News
from x402mw_client.schema import OPEN_SECONDS, open_file
from x402mw_client.sessions import Call, Opening, Past, Session, Stale, as_text

BLOCK_SECONDS = 0.02
"""A transaction waits this long for another process, then tells its caller to come back."""
_SPIN_SECONDS = 0.0002
_CHANGING = (
    "token",
    "target",
    "deposit",
    "expires_at",
    "cumulative",
    "charged",
    "held",
    "unattributed",
    "total_seen",
    "proven",
    "unreceipted",
    "receipt",
)
COLUMNS = ("id", "origin", "offer", "seed", "state", *_CHANGING)
"""The columns of `News.sessions`."""

_changing = attrgetter(*_CHANGING)
_NAMES = ", ".join(COLUMNS)
_MARKS = ", ".join("?" * (len(COLUMNS) + 1))
_ADD = f"INSERT INTO sessions ({_NAMES}, change) VALUES ({_MARKS})"  # noqa: S608 (constants)
_SETS = ", ".join(f"{name} = ?" for name in ("state", *_CHANGING, "change"))
_SAVE = f"UPDATE sessions SET {_SETS} WHERE id = ?"  # noqa: S608 (constants)
_NEWS = f"SELECT change, {_NAMES} FROM sessions WHERE change > ?"  # noqa: S608 (constants)


class WalletFile(Memory):
    """A wallet's memory in the file at `path`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens the file, or raises `ConfigurationError` saying why it cannot."""
        super().__init__()
        self.path = path
        self._locks = Locks(path)
        self._db = open_file(path, self._locks)
        self._me = secrets.token_hex(8)
        self._seen_change, self._seen_version, self._seen_folds = -1, -1, ""
        # Who opens the file may wait for once: nobody else does yet.
        self._patience, self._leaving = OPEN_SECONDS, False
        try:
            self._arrive()
        except (Busy, sqlite3.Error) as error:
            self.close()
            raise ConfigurationError(f"the wallet file cannot be opened: {error}") from None
        except BaseException:
            self.close()
            raise

    def _arrive(self) -> None:
        while not self._locks.take(self._me):
            pass  # Somebody who leaves is just looking whether this lock is anybody's.
        with self.transaction():
            self.recover()
            if not self._others():
                # The file may be an old copy: who comes first asks alone what is missing in it.
                self._db.execute("UPDATE sessions SET proven = 0")
            self._db.execute("INSERT INTO processes VALUES (?, 1)", (self._me,))
            self.settings = self._read_settings()

    def close(self) -> None:
        """Closes the file; calls that are still open are for the others, or the next, to ask about.

        Whoever uses the wallet after that fails: what cannot be remembered must not be done.
        """
        self._db.close()
        self._locks.close()

    # Transactions.

    @contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[None]:
        if durable:
            self._db.execute("PRAGMA synchronous = FULL")
        try:
            self._begin()
            try:
                yield
            except (X402mwError, Stale):
                # A refusal has changed nothing by itself; what was booked before it stays.
                self._db.execute("COMMIT")
                raise
            self._db.execute("COMMIT")
        except (X402mwError, Stale, Busy):
            raise
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            # The objects in RAM may be ahead of the file now: they are read again.
            self._seen_change = self._seen_version = -1
            raise
        finally:
            if durable:
                self._db.execute("PRAGMA synchronous = NORMAL")

    def _begin(self) -> None:
        deadline = time.monotonic() + self._patience
        while True:
            try:
                self._db.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                    raise
                if time.monotonic() >= deadline:
                    # Who is stuck once is not waited for again by each of many calls.
                    self._patience = 0.0
                    raise Busy("another process is changing the wallet file") from None
                time.sleep(_SPIN_SECONDS)
            else:
                self._patience = BLOCK_SECONDS
                return

    # What is written.

    def set(self, name: str, value: str) -> None:
        super().set(name, value)
        self._db.execute("REPLACE INTO settings VALUES (?, ?)", (name, value))

    def begin(self, opening: Opening) -> None:
        of = opening
        row = (of.key, of.origin, as_text(of.offer), of.seed, of.amount, of.target, of.seconds)
        self._db.execute("REPLACE INTO openings VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def abandon(self, opening: Opening) -> None:
        self._db.execute("DELETE FROM openings WHERE key = ?", (opening.key,))

    def add(self, session: Session) -> None:
        fixed = (session.id, session.origin, as_text(session.offer), session.seed)
        self._db.execute(_ADD, (*fixed, *self._changed(session)))

    def save(self, session: Session) -> None:
        self._db.execute(_SAVE, (*self._changed(session), session.id))

    def _changed(self, session: Session) -> tuple[object, ...]:
        self._seen_change += 1
        return (session.state.value, *_changing(session), self._seen_change)

    def fold(self, session: Session, past: Past) -> None:
        self._db.execute("DELETE FROM calls WHERE session = ?", (session.id,))
        self._db.execute("DELETE FROM sessions WHERE id = ?", (session.id,))
        self.set("past_charged", str(past.charged))
        self.set("past_worst", str(past.worst))
        self._seen_folds = str(int(self._seen_folds or "0") + 1)
        self.set("folds", self._seen_folds)

    def hold(self, call: Call, amount: Atomic, expires: int, *, new: bool) -> bool:
        key = call.session.id, call.seq
        if new:
            row = (*key, call.url, amount, expires, self._me)
            self._db.execute("INSERT INTO calls VALUES (?, ?, ?, ?, ?, ?)", row)
            return True
        found = self._db.execute(
            "UPDATE calls SET hold = ?, expires = ?, process = ? WHERE session = ? AND seq = ?",
            (amount, expires, self._me, *key),
        )
        return found.rowcount == 1

    def drop(self, call: Call) -> Atomic | None:
        found = self._db.execute(
            "DELETE FROM calls WHERE session = ? AND seq = ? RETURNING hold",
            (call.session.id, call.seq),
        ).fetchone()
        return None if found is None else Atomic(found[0])

    def drop_all(self, session: Session) -> None:
        self._db.execute("DELETE FROM calls WHERE session = ?", (session.id,))

    def leave(self, call: Call) -> None:
        self._db.execute(
            "UPDATE calls SET process = NULL WHERE session = ? AND seq = ?",
            (call.session.id, call.seq),
        )

    # What other processes did.

    def news(self) -> News | None:
        version = self._db.execute("PRAGMA data_version").fetchone()[0]
        if version == self._seen_version:
            return None
        self.settings = self._read_settings()
        folds = self.settings.get("folds", "0")
        everything = self._seen_change < 0 or folds != self._seen_folds
        rows = self._db.execute(_NEWS, (-1 if everything else self._seen_change,)).fetchall()
        openings = self._db.execute("SELECT * FROM openings").fetchall()
        self._seen_change = max([self._seen_change, *(row[0] for row in rows)])
        self._seen_version, self._seen_folds = version, folds
        past = Past(
            Atomic(int(self.settings.get("past_charged", "0"))),
            Atomic(int(self.settings.get("past_worst", "0"))),
        )
        return News([row[1:] for row in rows], openings, past, everything)

    def _read_settings(self) -> dict[str, str]:
        return dict(self._db.execute("SELECT name, value FROM settings"))

    def _others(self, *, staying: bool = False) -> list[str]:
        found = self._db.execute(
            "SELECT name FROM processes WHERE name != ? AND staying >= ?", (self._me, staying)
        )
        return [name for (name,) in found.fetchall() if not self._locks.is_free(name)]

    def recover(self) -> None:
        alive = {self._me, *self._others()}
        known = self._db.execute("SELECT name FROM processes").fetchall()
        for dead in [name for (name,) in known if name not in alive]:
            self._db.execute("UPDATE calls SET process = NULL WHERE process = ?", (dead,))
            self._db.execute("DELETE FROM processes WHERE name = ?", (dead,))
        # Whoever lost its place in the list, by whatever accident, leaves no call behind either.
        self._db.execute(
            "UPDATE calls SET process = NULL"
            " WHERE process IS NOT NULL AND process NOT IN (SELECT name FROM processes)"
        )

    def doubts(self) -> Iterator[tuple[bytes, int, str, Atomic, int]]:
        yield from self._db.execute(
            "SELECT session, seq, url, hold, expires FROM calls WHERE process IS NULL"
        ).fetchall()

    def busy_elsewhere(self, session: Session) -> bool:
        found = self._db.execute(
            "SELECT 1 FROM calls WHERE session = ? AND process != ? LIMIT 1",
            (session.id, self._me),
        )
        return found.fetchone() is not None

    def leave_to_others(self) -> bool:
        self._leaving = True
        self._db.execute("UPDATE processes SET staying = 0 WHERE name = ?", (self._me,))
        return bool(self._others(staying=True))

    def come_back(self) -> None:
        if self._leaving:
            self._leaving = False
            self._db.execute("UPDATE processes SET staying = 1 WHERE name = ?", (self._me,))

    def enter(self, name: object) -> bool:
        return self._locks.take(name)

    def exit(self, name: object) -> None:
        self._locks.release(name)


def open_memory(path: str | os.PathLike[str] | None) -> Memory:
    """A wallet's memory: in the file at `path`, or in RAM."""
    return Memory() if path is None else WalletFile(path)

"""One write transaction of the journal: rows are read once, changed in memory, written at the end.

Any number of operations share a transaction. An operation reads, decides, and only then puts rows:
if it raises before its first `put`, it has changed nothing.
"""

import itertools
import sqlite3
from collections.abc import Mapping
from dataclasses import astuple, replace
from typing import Any

from x402mw.core.amounts import Atomic
from x402mw.core.gate import Outcome
from x402mw.provider.journal import rows
from x402mw.provider.journal.rows import CallRow, Meter, SessionRow, Totals, Values

OLDEST_AT_ONCE = 64

CallKey = tuple[bytes, int]
MeterKey = tuple[bytes, bytes]


class Transaction:
    """The rows of one batch. `now` is in seconds; `totals` follow every row that is put."""

    def __init__(self, connection: sqlite3.Connection, now: float, outcome_bytes_max: int) -> None:
        self.now = now
        self.totals = Totals(*connection.execute(rows.READ_TOTALS).fetchone())
        self._changed = False
        self._connection = connection
        self._outcome_bytes_max = outcome_bytes_max
        self._sessions: dict[bytes, SessionRow | None] = {}
        self._calls: dict[CallKey, CallRow | None] = {}
        self._meters: dict[MeterKey, Meter | None] = {}
        self._new_sessions: dict[bytes, SessionRow] = {}
        self._new_calls: dict[CallKey, CallRow] = {}
        self._new_meters: dict[MeterKey, Meter] = {}

    # Rows that operations share.

    def session(self, session: bytes) -> SessionRow | None:
        """Returns the session's row."""
        if session not in self._sessions:
            found = self._connection.execute(rows.READ_SESSION, (session,)).fetchone()
            self._sessions[session] = found and rows.read_session(found)
        return self._sessions[session]

    def put_session(self, row: SessionRow) -> None:
        """Writes a session, keeping `owed_since` and the total of what is unredeemed true."""
        before = self.session(row.id)
        if (row.owed > 0) != (row.owed_since is not None):
            row = replace(row, owed_since=int(self.now) if row.owed else None)
        grown = row.unredeemed - (before.unredeemed if before else 0)
        self.totals.unredeemed = Atomic(self.totals.unredeemed + grown)
        self._sessions[row.id] = self._new_sessions[row.id] = row

    def call(self, session: bytes, seq: int) -> CallRow | None:
        """Returns the row of (session, seq)."""
        key = (session, seq)
        if key not in self._calls:
            found = self._connection.execute(rows.READ_CALL, key).fetchone()
            self._calls[key] = found and rows.read_call(found)
        return self._calls[key]

    def put_call(self, row: CallRow) -> None:
        """Writes a call."""
        key = (row.session, row.seq)
        self._calls[key] = self._new_calls[key] = row

    def meter(self, session: bytes, terms: bytes) -> Meter | None:
        """Returns what the session has used so far under these terms."""
        key = (session, terms)
        if key not in self._meters:
            found = self._connection.execute(rows.READ_METER, key).fetchone()
            self._meters[key] = found and Meter(*found)
        return self._meters[key]

    def put_meter(self, session: bytes, terms: bytes, meter: Meter) -> None:
        """Writes what the session has used so far under these terms."""
        key = (session, terms)
        self._meters[key] = self._new_meters[key] = meter

    # Stored outcomes, which are written at once and never changed.

    def outcome(self, session: bytes, seq: int) -> Outcome | None:
        """Returns the stored answer of a call, if it is still kept."""
        found = self._connection.execute(rows.READ_OUTCOME, (session, seq)).fetchone()
        return found and rows.read_outcome(found)

    def put_outcome(self, session: bytes, seq: int, outcome: Outcome) -> None:
        """Stores an answer; the oldest make room for it."""
        *values, size = rows.write_outcome(outcome)
        self.write(rows.WRITE_OUTCOME, (session, seq, *values, size))
        self.totals.outcome_bytes += size
        while self.totals.outcome_bytes > self._outcome_bytes_max:
            self._drop_oldest_outcomes()

    def _drop_oldest_outcomes(self) -> None:
        for name, size in self.select(rows.OLDEST_OUTCOMES, (OLDEST_AT_ONCE,)):
            if self.totals.outcome_bytes <= self._outcome_bytes_max:
                return
            self.write(rows.DROP_OUTCOME, (name,))
            self.totals.outcome_bytes -= size

    # Everything else.

    def select(self, statement: str, values: Values | Mapping[str, Any] = ()) -> list[Values]:
        """Reads rows by a query, which sees everything put so far."""
        self._flush()
        return self._connection.execute(statement, values).fetchall()

    def write(self, statement: str, values: Values = ()) -> list[Values]:
        """Writes rows that no operation holds in memory."""
        self._changed = True
        return self._connection.execute(statement, values).fetchall()

    def finish(self) -> bool:
        """Writes everything; tells whether there is anything to commit."""
        self._flush()
        if self._changed:
            self.totals.serial += 1
            self._connection.execute(rows.WRITE_TOTALS, astuple(self.totals))
        return self._changed

    def _flush(self) -> None:
        many = self._connection.executemany
        for statement, new in (
            (rows.WRITE_SESSION, map(rows.write_session, self._new_sessions.values())),
            (rows.WRITE_CALL, map(rows.write_call, self._new_calls.values())),
            (rows.WRITE_METER, itertools.starmap(rows.write_meter, self._new_meters.items())),
        ):
            many(statement, new)
        self._changed |= bool(self._new_sessions or self._new_calls or self._new_meters)
        self._new_sessions, self._new_calls, self._new_meters = {}, {}, {}

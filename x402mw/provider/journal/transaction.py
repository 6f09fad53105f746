"""One write transaction of the journal: rows are read once, changed in memory, written at the end.

Any number of operations share a transaction. An operation reads, decides, and only then puts rows:
if it raises before its first `put`, it has changed nothing.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from x402mw.core.amounts import Atomic
from x402mw.core.gate import CallState, Outcome
from x402mw.provider.journal import rows
from x402mw.provider.journal.rows import CallRow, Meter, SessionRow, Totals
from x402mw.provider.journal.shared import Shared, read_shared
from x402mw.provider.journal.store import Store, Values, check_types

OLDEST_AT_ONCE = 64
KNOWN_MAX = 2000
"""Rows of one kind that are kept in mind between batches."""

CallKey = tuple[bytes, int]
MeterKey = tuple[bytes, bytes]


class Needs(NamedTuple):
    """The call that an operation is about; `terms` are its terms' id if they meter."""

    session: bytes
    seq: int
    terms: bytes | None = None


class Known:
    """Rows that our last batches have read or written, from which the next one may go on.

    Once somebody else has written, or a batch has failed, it is thrown away.
    """

    def __init__(self) -> None:
        self.sessions: dict[bytes, SessionRow | None] = {}
        self.calls: dict[CallKey, CallRow | None] = {}
        self.meters: dict[MeterKey, Meter | None] = {}
        self.last_call: int | None = None

    def trim(self, calls: Iterable[CallKey]) -> None:
        """After a batch: keeps of its `calls` those that run, and of the others not too many."""
        for key in calls:
            row = self.calls.get(key)
            if row is None or row.state is CallState.SETTLED:
                self.calls.pop(key, None)
        for found in (self.sessions, self.calls, self.meters):
            if len(found) > KNOWN_MAX:
                found.clear()


class Transaction:
    """The rows of one batch. `now` is in seconds; `totals` follow every row that is put.

    `worker` is the number of the process that writes, `shared` what all workers have in common,
    `known` what the batches before have left.
    """

    def __init__(
        self,
        store: Store,
        totals: Totals,
        *,
        now: float,
        shared: Shared,
        known: Known,
        outcome_bytes_max: int,
    ) -> None:
        self.now = now
        self.totals = totals
        self.shared = shared
        self.worker = store.worker
        self._store = store
        self._changed = False
        self._outcome_bytes_max = outcome_bytes_max
        self.known = known
        self._sessions, self._calls, self._meters = known.sessions, known.calls, known.meters
        self._touched: set[CallKey] = set()
        self._new_sessions: dict[bytes, SessionRow] = {}
        self._new_calls: dict[CallKey, CallRow] = {}
        self._new_meters: dict[MeterKey, Meter] = {}
        self._new_outcomes: list[Values] = []

    def fetch(self, needs: Iterable[Needs]) -> None:
        """Reads what several operations are about all at once, which is only a matter of speed."""
        needs = set(needs)
        sessions = {session for session, _, _ in needs} - self._sessions.keys()
        meters = {(session, terms) for session, _, terms in needs if terms is not None}
        self._fetch_sessions([(session,) for session in sessions])
        self._fetch_calls({(session, seq) for session, seq, _ in needs} - self._calls.keys())
        self._fetch_meters(meters - self._meters.keys())

    def forget_known(self) -> None:
        """Has every row read anew: before rows are removed behind our back."""
        for found in (self._sessions, self._calls, self._meters):
            found.clear()

    # Rows that operations share.

    def session(self, session: bytes) -> SessionRow | None:
        """Returns the session's row."""
        if session not in self._sessions:
            self._fetch_sessions([(session,)])
        return self._sessions[session]

    def _fetch_sessions(self, keys: list[tuple[bytes]]) -> None:
        self._sessions.update((session, None) for (session,) in keys)
        for values in self._store.read_rows(rows.SESSIONS, keys):
            row = rows.read_session(values)
            self._sessions[row.id] = row

    def put_session(self, row: SessionRow) -> None:
        """Writes a session, keeping `owed_since` and the total of what is unredeemed true."""
        before = self.session(row.id)
        if (row.owed > 0) != (row.owed_since is not None):
            row = row._replace(owed_since=int(self.now) if row.owed else None)
        grown = row.unredeemed - (before.unredeemed if before else 0)
        self.totals.unredeemed = Atomic(self.totals.unredeemed + grown)
        self._sessions[row.id] = self._new_sessions[row.id] = row

    def call(self, session: bytes, seq: int) -> CallRow | None:
        """Returns the row of (session, seq)."""
        key = (session, seq)
        if key not in self._calls:
            self._fetch_calls({key})
        self._touched.add(key)
        return self._calls[key]

    def _fetch_calls(self, keys: set[CallKey]) -> None:
        self._touched |= keys
        self._calls.update((key, None) for key in keys)
        for values in self._store.read_rows(rows.CALLS, [*keys]):
            row = rows.read_call(values)
            self._calls[row.session, row.seq] = row

    def new_call(self) -> int:
        """Returns the number of one more call."""
        if self.known.last_call is None:
            ((self.known.last_call,),) = self._store.select(rows.LAST_CALL)
        self.known.last_call += 1
        return self.known.last_call

    def put_call(self, row: CallRow) -> None:
        """Writes a call."""
        key = (row.session, row.seq)
        self._touched.add(key)
        self._calls[key] = self._new_calls[key] = row

    def meter(self, session: bytes, terms: bytes) -> Meter | None:
        """Returns what the session has used so far under these terms."""
        key = (session, terms)
        if key not in self._meters:
            self._fetch_meters({key})
        return self._meters[key]

    def _fetch_meters(self, keys: set[MeterKey]) -> None:
        self._meters.update((key, None) for key in keys)
        for session, terms, *values in self._store.read_rows(rows.METERS, [*keys]):
            self._meters[session, terms] = Meter(*values)

    def put_meter(self, session: bytes, terms: bytes, meter: Meter) -> None:
        """Writes what the session has used so far under these terms."""
        key = (session, terms)
        self._meters[key] = self._new_meters[key] = meter

    # Stored outcomes, which are written once and never changed.

    def outcome(self, call: CallRow) -> Outcome | None:
        """Returns the stored answer of a call, if it is still kept."""
        found = self.select(rows.READ_OUTCOME, (call.id,))
        return rows.read_outcome(found[0]) if found else None

    def put_outcome(self, call: CallRow, outcome: Outcome) -> None:
        """Stores an answer; the oldest make room for it."""
        *values, size = rows.write_outcome(outcome)
        self._new_outcomes.append((call.id, *values, size))
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
        return self._store.select(statement, values)

    def write(self, statement: str, values: Values = ()) -> list[Values]:
        """Writes rows that no operation holds in memory."""
        self._changed = True
        return self._store.select(statement, values)

    def write_setting(self, key: str, value: str) -> None:
        """Keeps a value for all workers."""
        self.write(rows.WRITE_SETTING, (key, value))
        self.tell_workers()

    def tell_workers(self) -> None:
        """Has every worker, ourselves too, read anew what all have in common."""
        self.totals.generation += 1
        self.shared = read_shared(self._store, self.totals.generation)

    def finish(self) -> bool:
        """Writes everything; tells whether there is anything to commit."""
        self._flush()
        if self._changed:
            self.totals.serial += 1
            self._store.select(rows.WRITE_TOTALS, rows.write_totals(self.totals))
        self.known.trim(self._touched)
        return self._changed

    def _flush(self) -> None:
        for table, new in (
            (rows.SESSIONS, [*map(rows.write_session, self._new_sessions.values())]),
            (rows.CALLS, [*map(rows.write_call, self._new_calls.values())]),
            (rows.METERS, [*itertools.starmap(rows.write_meter, self._new_meters.items())]),
            (rows.OUTCOMES, self._new_outcomes),
        ):
            if new:
                check_types(new)
                self._store.write_rows(table, new)
                self._changed = True
        self._new_sessions, self._new_calls, self._new_meters = {}, {}, {}
        self._new_outcomes = []

"""The journal's rows as values, and every SQL statement that reads or writes one.

The statements are SQLite's; what another database says otherwise is translated there. `greatest` is
the largest of several values.

Rows are tuples: an operation reads one, makes the next, and hands it to the transaction. Amounts
are atomic units, times whole seconds, ids raw bytes.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from x402mw.core.amounts import ZERO, Atomic
from x402mw.core.gate import Call, CallState, Outcome
from x402mw.core.sessions import Account, SessionState
from x402mw.provider.journal.store import Table, Values

FIELDS_CACHED = 256


@dataclass(slots=True)
class Totals:
    """What is true of the whole journal; each transaction has a copy of its own to change.

    `serial` counts committed batches; a journal whose serial is below one the escrow has seen is a
    restored backup. `forgotten_until` is the latest `forget_at` of a pruned call. `generation`
    grows with every change of what workers keep in memory (`shared.Shared`).
    """

    serial: int
    unredeemed: Atomic
    outcome_bytes: int
    forgotten_until: int
    generation: int


class SessionRow(NamedTuple):
    """One session: its account, and how far it is redeemed.

    `voucher` is the newest (176 bytes). `sent` is the highest amount ever sent to the escrow,
    written before it was sent; `redeemed` and `released` are what the escrow reports. `ended` means
    terminal at the escrow. `owed_since` is when something became redeemable, None if nothing is.
    """

    id: bytes
    journal: bytes
    account: Account
    voucher: bytes | None
    claim_until: int
    sent: Atomic = ZERO
    redeemed: Atomic = ZERO
    released: Atomic = ZERO
    owed_since: int | None = None
    retry_at: int = 0
    ended: bool = False
    written_off: str | None = None

    @property
    def paid(self) -> Atomic:
        """What the escrow has paid us, through vouchers or by the buyer's own hand."""
        return max(self.redeemed, self.released)

    @property
    def owed(self) -> int:
        """What redeeming now would bring."""
        return 0 if self.written_off else max(0, self.account.charged - self.paid)

    @property
    def unredeemed(self) -> int:
        """What we would lose if the escrow never came back: charged and reserved, not yet paid."""
        if self.written_off:
            return 0
        account = self.account
        return max(0, account.charged + account.reserved - self.paid)


class CallRow(NamedTuple):
    """One admitted request. `id` numbers the calls of a journal in the order of their admission.

    A crash charges `mark` plus the price of `mark_units` for a started call. `used` is the quantity
    billed. After `forget_at` the row and its stored outcome may go. `worker` is who runs it.
    """

    id: int
    session: bytes
    seq: int
    commitment: bytes
    terms: bytes
    amount: Atomic
    state: CallState
    forget_at: int
    worker: int
    mark: Atomic = ZERO
    mark_units: int = 0
    charge: Atomic = ZERO
    used: int = 0

    def as_call(self, outcome: Outcome | None) -> Call:
        """The row as `gate` judges it."""
        return Call(
            session=self.session,
            seq=self.seq,
            commitment=self.commitment,
            amount=self.amount,
            state=self.state,
            charge=self.charge,
            outcome=outcome,
        )


class Meter(NamedTuple):
    """What a session has used so far under one metered price."""

    unit_price: int
    per: int
    quantity: int = 0


READ_TOTALS = "SELECT serial, unredeemed, outcome_bytes, forgotten_until, generation FROM totals"
WRITE_TOTALS = (
    "UPDATE totals SET serial = ?, unredeemed = ?, outcome_bytes = ?, forgotten_until = ?,"
    " generation = ?"
)

SESSIONS = Table(
    "sessions",
    key=("id",),
    columns=(
        *("id", "journal", "deposit", "best", "charged", "reserved", "state", "voucher"),
        *("claim_until", "sent", "redeemed", "released", "owed_since", "retry_at", "ended"),
        "written_off",
    ),
    changing=(
        *("deposit", "best", "charged", "reserved", "state", "voucher", "claim_until", "sent"),
        *("redeemed", "released", "owed_since", "retry_at", "ended", "written_off"),
    ),
)
CALLS = Table(
    "calls",
    key=("session", "seq"),
    columns=(
        *("id", "session", "seq", "commitment", "terms", "amount", "state", "forget_at", "worker"),
        *("mark", "mark_units", "charge", "used"),
    ),
    changing=("state", "mark", "mark_units", "charge", "used"),
)
METERS = Table(
    "meters",
    key=("session", "terms"),
    columns=("session", "terms", "unit_price", "per", "quantity"),
    changing=("quantity",),
    identity=("session", "terms"),
)
OUTCOMES = Table(
    "outcomes",
    key=(),
    columns=("id", "status", "headers", "body", "credentials", "size"),
    changing=(),
)

_SELECT_SESSION = f"SELECT {', '.join(SESSIONS.columns)} FROM sessions "  # noqa: S608 (no input)
_SELECT_CALL = f"SELECT {', '.join(CALLS.columns)} FROM calls "  # noqa: S608 (no input)
READ_UNSETTLED = _SELECT_CALL + "WHERE state <> 'settled' AND worker = ?"
BUSY_WORKERS = "SELECT DISTINCT worker FROM calls WHERE state <> 'settled'"
# Left to itself SQLite would go through all calls of the session, which may be very many.
COUNT_UNSETTLED = """
    SELECT count(*) FROM calls INDEXED BY calls_unsettled
    WHERE session = ? AND state <> 'settled'
"""

LAST_CALL = "SELECT coalesce(max(id), 0) FROM calls"
READ_OUTCOME = "SELECT status, headers, body, credentials FROM outcomes WHERE id = ?"
OLDEST_OUTCOMES = "SELECT id, size FROM outcomes ORDER BY id LIMIT ?"
DROP_OUTCOME = "DELETE FROM outcomes WHERE id = ? RETURNING size"

FORGETTABLE_CALLS = """
    SELECT id, forget_at FROM calls
    WHERE state = 'settled' AND forget_at <= ? ORDER BY forget_at LIMIT ?
"""
DROP_CALL = "DELETE FROM calls WHERE id = ?"
FORGETTABLE_SESSIONS = """
    SELECT id, claim_until FROM sessions
    WHERE ended = 1 AND claim_until <= ? AND reserved = 0 AND owed_since IS NULL
    ORDER BY claim_until LIMIT ?
"""
DROP_SESSION = "DELETE FROM sessions WHERE id = ?"
DROP_METERS = "DELETE FROM meters WHERE session = ?"

CLOSING_SESSIONS = (
    _SELECT_SESSION
    + """
    WHERE state = 'closing' AND ended = 0 AND reserved = 0 AND written_off IS NULL
    AND retry_at <= ? ORDER BY id LIMIT ?
"""
)
OWED_SESSIONS = (
    _SELECT_SESSION
    + """
    WHERE owed_since IS NOT NULL AND retry_at <= :now
    AND (owed_since <= :owed_before OR claim_until <= :claim_before
         OR charged - greatest(redeemed, released) >= :amount)
    ORDER BY claim_until LIMIT :limit
"""
)
OLDEST_OWED = "SELECT min(owed_since) FROM sessions WHERE owed_since IS NOT NULL"
# A sum is cast because some databases widen it to a decimal.
READ_SUMS = """
    SELECT
        (SELECT coalesce(CAST(sum(
            greatest(0, charged + reserved - greatest(redeemed, released))
        ) AS BIGINT), 0) FROM sessions WHERE written_off IS NULL),
        (SELECT coalesce(CAST(sum(size) AS BIGINT), 0) FROM outcomes),
        (SELECT coalesce(CAST(sum(reserved) AS BIGINT), 0) FROM sessions),
        (SELECT coalesce(CAST(sum(amount) AS BIGINT), 0) FROM calls WHERE state <> 'settled')
"""

READ_SETTINGS = "SELECT key, value FROM settings"
WRITE_SETTING = """
    INSERT INTO settings (key, value) VALUES (?, ?)
    ON CONFLICT (key) DO UPDATE SET value = excluded.value
"""
READ_JOURNALS = "SELECT id, receipt_seed, replaced FROM journals"
REPLACE_JOURNAL = "UPDATE journals SET replaced = 1 WHERE replaced = 0"
ADD_JOURNAL = "INSERT INTO journals (id, receipt_seed, replaced) VALUES (?, ?, 0)"

RETIRE_TERMS = "UPDATE terms SET retired_at = ? WHERE retired_at IS NULL"
KEEP_TERMS = """
    INSERT INTO terms (id, retired_at) VALUES (?, NULL)
    ON CONFLICT (id) DO UPDATE SET retired_at = NULL
"""
DROP_TERMS = "DELETE FROM terms WHERE retired_at < ?"
READ_RETIRED_TERMS = "SELECT id, retired_at FROM terms WHERE retired_at IS NOT NULL"


_SESSION_STATES = {state.value: state for state in SessionState}
_CALL_STATES = {state.value: state for state in CallState}


def read_session(values: Values) -> SessionRow:
    """Makes a session of a row of `SESSIONS`."""
    (session, journal, deposit, best, charged, reserved, state, *rest) = values
    (voucher, claim_until, sent, redeemed, released, owed_since, retry_at, ended, off) = rest
    return SessionRow(
        id=session,
        journal=journal,
        account=Account(deposit, best, charged, reserved, _SESSION_STATES[state]),
        voucher=voucher,
        claim_until=claim_until,
        sent=sent,
        redeemed=redeemed,
        released=released,
        owed_since=owed_since,
        retry_at=retry_at,
        ended=bool(ended),
        written_off=off,
    )


def write_totals(totals: Totals) -> Values:
    """The values of `WRITE_TOTALS`."""
    return (
        totals.serial,
        totals.unredeemed,
        totals.outcome_bytes,
        totals.forgotten_until,
        totals.generation,
    )


def write_session(row: SessionRow) -> Values:
    """The row of `SESSIONS`."""
    account = row.account
    return (
        row.id,
        row.journal,
        account.deposit,
        account.best,
        account.charged,
        account.reserved,
        account.state.value,
        row.voucher,
        row.claim_until,
        row.sent,
        row.redeemed,
        row.released,
        row.owed_since,
        row.retry_at,
        int(row.ended),
        row.written_off,
    )


def read_call(values: Values) -> CallRow:
    """Makes a call of a row of `CALLS`."""
    name, session, seq, commitment, terms, amount, state, *rest = values
    return CallRow(name, session, seq, commitment, terms, amount, _CALL_STATES[state], *rest)


def write_call(row: CallRow) -> Values:
    """The row of `CALLS`."""
    return (
        row.id,
        row.session,
        row.seq,
        row.commitment,
        row.terms,
        row.amount,
        row.state.value,
        row.forget_at,
        row.worker,
        row.mark,
        row.mark_units,
        row.charge,
        row.used,
    )


def write_meter(key: tuple[bytes, bytes], meter: Meter) -> Values:
    """The row of `METERS`; its key is (session, terms id)."""
    return (*key, meter.unit_price, meter.per, meter.quantity)


def read_outcome(values: Values) -> Outcome:
    """Makes a stored outcome of (status, headers, body, credentials)."""
    status, fields, body, credentials = values
    pairs = tuple(
        (name.encode("latin-1"), value.encode("latin-1")) for name, value in json.loads(fields)
    )
    return Outcome(status, pairs, body, credentials)


@lru_cache(maxsize=FIELDS_CACHED)
def _write_fields(found: tuple[tuple[bytes, bytes], ...]) -> str:
    # The answers of a route mostly have the same ones.
    return json.dumps([(name.decode("latin-1"), value.decode("latin-1")) for name, value in found])


def write_outcome(outcome: Outcome) -> Values:
    """The values of (status, headers, body, credentials, size)."""
    fields = _write_fields(outcome.headers)
    size = len(outcome.body) + len(fields)
    return outcome.status, fields, outcome.body, outcome.credentials, size

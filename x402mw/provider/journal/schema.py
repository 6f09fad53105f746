"""The journal's file: its tables, how it is opened, and how damage is found.

STRICT tables refuse a number that is not an integer and the checks refuse an impossible account, so
a bug in the code above can stop a write but not store nonsense (`docs/money.md`, M1).
"""

import os
import sqlite3

from x402mw.core.errors import ConfigurationError
from x402mw.provider.journal.errors import JournalCorrupt, JournalLocked
from x402mw.provider.journal.lock import OWNER_ONLY
from x402mw.provider.journal.store import Durability
from x402mw.sqlite_log import lost_commits

SYNCHRONOUS = {"fsync": "FULL", "process": "NORMAL"}
APPLICATION_ID = 0x34303242
SCHEMA_VERSION = 3
BUSY_SECONDS = 2.0
LOST_COMMITS_MAX = 1
"""Of one commit the power may have failed before anybody was told of it."""
STATEMENTS_CACHED = 256

_CALLS = """
-- Numbered in the order of admission, so that what is written together lies together.
CREATE TABLE calls (
    id         INTEGER PRIMARY KEY,
    session    BLOB    NOT NULL,
    seq        INTEGER NOT NULL CHECK (seq >= 0),
    commitment BLOB    NOT NULL CHECK (length(commitment) = 32),
    terms      BLOB    NOT NULL CHECK (length(terms) = 32),
    amount     INTEGER NOT NULL CHECK (amount >= 0),
    state      TEXT    NOT NULL CHECK (state IN ('open', 'started', 'settled')),
    mark       INTEGER NOT NULL CHECK (mark BETWEEN 0 AND amount),
    mark_units INTEGER NOT NULL CHECK (mark_units >= 0),
    charge     INTEGER NOT NULL CHECK (charge BETWEEN 0 AND amount),
    used       INTEGER NOT NULL CHECK (used >= 0),
    forget_at  INTEGER NOT NULL,
    worker     INTEGER NOT NULL CHECK (worker >= 0),  -- who runs it
    UNIQUE (session, seq)
) STRICT;
CREATE INDEX calls_unsettled ON calls (session) WHERE state <> 'settled';
CREATE INDEX calls_settled ON calls (forget_at) WHERE state = 'settled';

-- Answers kept for identical retries, each under the number of its call.
CREATE TABLE outcomes (
    id          INTEGER PRIMARY KEY,
    size        INTEGER NOT NULL CHECK (size >= 0),  -- of headers and body, in bytes
    status      INTEGER NOT NULL,
    credentials BLOB    NOT NULL,
    headers     TEXT    NOT NULL,
    body        BLOB    NOT NULL
) STRICT;
"""

SCHEMA = (
    _CALLS
    + """
CREATE TABLE settings (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- The one row that every committed batch rewrites.
CREATE TABLE totals (
    one             INTEGER PRIMARY KEY CHECK (one = 1),
    serial          INTEGER NOT NULL,  -- committed batches so far; the escrow keeps the highest
    unredeemed      INTEGER NOT NULL CHECK (unredeemed >= 0),
    outcome_bytes   INTEGER NOT NULL CHECK (outcome_bytes >= 0),
    forgotten_until INTEGER NOT NULL,  -- the latest `forget_at` of any pruned call
    generation      INTEGER NOT NULL DEFAULT 0  -- grows when a setting or the identity changes
) STRICT;
INSERT INTO totals VALUES (1, 0, 0, 0, 0, 0);

-- The identities this book has had; the one that is not replaced is current.
CREATE TABLE journals (
    id           BLOB PRIMARY KEY CHECK (length(id) = 16),
    receipt_seed BLOB NOT NULL CHECK (length(receipt_seed) = 32),
    replaced     INTEGER NOT NULL CHECK (replaced IN (0, 1))
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX one_current_journal ON journals (replaced) WHERE replaced = 0;

CREATE TABLE sessions (
    id          BLOB PRIMARY KEY CHECK (length(id) = 16),
    journal     BLOB NOT NULL,
    deposit     INTEGER NOT NULL,
    best        INTEGER NOT NULL,
    charged     INTEGER NOT NULL CHECK (charged >= 0),
    reserved    INTEGER NOT NULL CHECK (reserved >= 0),
    state       TEXT    NOT NULL CHECK (state IN ('open', 'closing', 'closed')),
    voucher     BLOB    CHECK (length(voucher) = 176),   -- the newest: its cumulative is `best`
    claim_until INTEGER NOT NULL,                        -- the largest seen, in seconds
    sent        INTEGER NOT NULL CHECK (sent BETWEEN 0 AND charged),
    redeemed    INTEGER NOT NULL CHECK (redeemed >= 0),
    released    INTEGER NOT NULL CHECK (released >= 0),
    owed_since  INTEGER,                                 -- when something became redeemable
    retry_at    INTEGER NOT NULL,                        -- not redeemed again before
    ended       INTEGER NOT NULL CHECK (ended IN (0, 1)),  -- terminal at the escrow
    written_off TEXT,                                    -- why the escrow refused for good
    CHECK (charged <= best - reserved AND best <= deposit)
) STRICT, WITHOUT ROWID;
CREATE INDEX sessions_owed ON sessions (claim_until) WHERE owed_since IS NOT NULL;
CREATE INDEX sessions_closing ON sessions (id) WHERE state = 'closing';
CREATE INDEX sessions_ended ON sessions (claim_until) WHERE ended = 1;

-- What a session has used so far under one metered price.
CREATE TABLE meters (
    session    BLOB    NOT NULL,
    terms      BLOB    NOT NULL,
    unit_price INTEGER NOT NULL CHECK (unit_price > 0),
    per        INTEGER NOT NULL CHECK (per > 0),
    quantity   INTEGER NOT NULL CHECK (quantity >= 0),
    PRIMARY KEY (session, terms)
) STRICT, WITHOUT ROWID;

CREATE TABLE terms (
    id         BLOB PRIMARY KEY,
    retired_at INTEGER
) STRICT, WITHOUT ROWID;
"""
)

_BEFORE_NUMBERS = """
ALTER TABLE calls RENAME TO calls_before;
ALTER TABLE outcomes RENAME TO outcomes_before;
DROP INDEX calls_unsettled;
DROP INDEX calls_settled;
"""
_GIVE_NUMBERS = """
INSERT INTO calls
    SELECT row_number() OVER (ORDER BY forget_at), session, seq, commitment, terms, amount, state,
        mark, mark_units, charge, used, forget_at, worker
    FROM calls_before;
INSERT INTO outcomes
    SELECT calls.id, size, status, credentials, headers, body
    FROM outcomes_before JOIN calls USING (session, seq);
DROP TABLE outcomes_before;
DROP TABLE calls_before;
"""
MIGRATIONS = {
    1: """
ALTER TABLE totals ADD COLUMN generation INTEGER NOT NULL DEFAULT 0;
ALTER TABLE calls ADD COLUMN worker INTEGER NOT NULL DEFAULT 0 CHECK (worker >= 0);
""",
    2: _BEFORE_NUMBERS + _CALLS + _GIVE_NUMBERS,
}
"""How the tables of each older version become those of the next, in one transaction."""


def migrate_from(version: int) -> str:
    """The statements that make the tables of an older version today's."""
    return "".join(MIGRATIONS[step] for step in range(version, SCHEMA_VERSION))


def open_database(path: str, durability: Durability, *, alone: bool) -> sqlite3.Connection:
    """Opens or creates the file (mode 0600), or raises `JournalCorrupt`.

    Who is `alone` also looks whether commits were lost. The connection is in autocommit mode:
    transactions are begun by hand.
    """
    try:
        if alone and durability == "fsync":
            _check_log(path)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, OWNER_ONLY))
        os.chmod(path, OWNER_ONLY)  # It holds a signing key, whoever made the file.
        connection = sqlite3.connect(
            path,
            timeout=BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=STATEMENTS_CACHED,
        )
    except (OSError, sqlite3.Error) as error:
        raise ConfigurationError(f"the journal {path} cannot be opened: {error}") from None
    try:
        _prepare(connection, path, durability, alone=alone)
        if alone:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(
    connection: sqlite3.Connection, path: str, durability: Durability, *, alone: bool
) -> None:
    try:
        connection.execute(f"PRAGMA synchronous = {SYNCHRONOUS[durability]}")
        # Each statement of many rows can be taken back by itself: by default, from a file.
        connection.execute("PRAGMA temp_store = MEMORY")
        check_integrity(connection, path)
        connection.execute("PRAGMA journal_mode = WAL")
        _migrate(connection, path, alone=alone)
    except sqlite3.DatabaseError as error:
        raise JournalCorrupt(_advice(path, str(error))) from None


def _check_log(path: str) -> None:
    lost = lost_commits(path)
    if lost > LOST_COMMITS_MAX:
        raise JournalCorrupt(
            _advice(path, f"{lost} commits are lost")
            + '; if it was written with durability="process" and the power failed, that is how much'
            " that loses: open it once with the same setting"
        )


def check_integrity(connection: sqlite3.Connection, path: str) -> None:
    """Raises `JournalCorrupt` if the file's structure or one of its checks is broken."""
    (answer,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if answer != "ok":
        raise JournalCorrupt(_advice(path, answer))


def _migrate(connection: sqlite3.Connection, path: str, *, alone: bool) -> None:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if (application, version, tables) == (0, 0, 0):
        _change(connection, SCHEMA)
    elif application == APPLICATION_ID and version in MIGRATIONS:
        if not alone:
            raise JournalLocked(f"the journal {path} is in use by an older version")
        _change(connection, migrate_from(version))
    elif (application, version) != (APPLICATION_ID, SCHEMA_VERSION):
        raise ConfigurationError(f"{path} is not a journal that this version can read")


def _change(connection: sqlite3.Connection, statements: str) -> None:
    connection.executescript(
        f"BEGIN IMMEDIATE; PRAGMA application_id = {APPLICATION_ID};"
        f"PRAGMA user_version = {SCHEMA_VERSION}; {statements} COMMIT;"
    )


def _advice(path: str, problem: str) -> str:
    return (
        f"the journal {path} is damaged ({problem}); keep the file, restore a backup of it or "
        "start with a new one, and the escrow still pays what was redeemed before"
    )

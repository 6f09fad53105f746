"""Journals that an older version has written."""

from pathlib import Path

import pytest

from tests.provider.journals import Clock, admit, admitted, claim, outcome
from tests.provider.places import execute
from x402mw.provider.journal import Journal, JournalLocked

pytestmark = pytest.mark.anyio

SECOND = """
ALTER TABLE calls RENAME TO calls_after;
ALTER TABLE outcomes RENAME TO outcomes_after;
DROP INDEX calls_unsettled;
DROP INDEX calls_settled;
CREATE TABLE calls (
    session BLOB NOT NULL, seq INTEGER NOT NULL, commitment BLOB NOT NULL, terms BLOB NOT NULL,
    amount INTEGER NOT NULL, state TEXT NOT NULL, mark INTEGER NOT NULL,
    mark_units INTEGER NOT NULL, charge INTEGER NOT NULL, used INTEGER NOT NULL,
    forget_at INTEGER NOT NULL, worker INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (session, seq)
);
INSERT INTO calls SELECT session, seq, commitment, terms, amount, state, mark, mark_units, charge,
    used, forget_at, worker FROM calls_after;
CREATE INDEX calls_unsettled ON calls (session) WHERE state <> 'settled';
CREATE INDEX calls_settled ON calls (forget_at) WHERE state = 'settled';
CREATE TABLE outcomes (
    id INTEGER PRIMARY KEY, session BLOB NOT NULL, seq INTEGER NOT NULL, size INTEGER NOT NULL,
    status INTEGER NOT NULL, credentials BLOB NOT NULL, headers TEXT NOT NULL, body BLOB NOT NULL,
    UNIQUE (session, seq)
);
INSERT INTO outcomes SELECT o.id + 7, session, seq, size, status, credentials, headers, body
    FROM outcomes_after AS o JOIN calls_after AS c ON c.id = o.id;
DROP TABLE outcomes_after;
DROP TABLE calls_after;
UPDATE calls SET state = 'open' WHERE seq = 1;
UPDATE sessions SET reserved = 1000;
UPDATE totals SET unredeemed = 2000
"""
"""Makes of today's tables those of the second version, with the first call open."""

FIRST = """
ALTER TABLE totals DROP COLUMN generation;
ALTER TABLE calls DROP COLUMN worker
"""
"""Makes of the second version the first, which only SQLite had."""


def change(place: str, changes: str, version: int) -> None:
    """Gives a journal the tables and the number of another version."""
    if "://" in place:
        changes = changes.replace("BLOB", "BYTEA").replace("INTEGER", "BIGINT")
        number = f"UPDATE settings SET value = '{version}' WHERE key = 'schema_version'"
    else:
        number = f"PRAGMA user_version = {version}"
    execute(place, *filter(str.strip, changes.split(";")), number)


async def fill(place: str) -> bytes:
    """Makes a journal with a call that was void and one that was charged; returns its id."""
    journal = Journal.open(place, clock=Clock())
    await journal.settle(await admitted(journal, claim(1)), used=None, outcome=None)
    await journal.settle(await admitted(journal, claim(2)), used=0, outcome=outcome())
    journal.close()
    return journal.journal_id


async def check(place: str, journal_id: bytes) -> None:
    """Opens what `fill` made, as an older version left it: its open call is settled."""
    journal = Journal.open(place, clock=Clock())
    assert journal.journal_id == journal_id
    assert journal.unredeemed == 1000
    assert await admit(journal, claim(2)) == outcome()
    call = await admitted(journal, claim(3))
    await journal.settle(call, used=0, outcome=outcome(b"new"))
    assert await admit(journal, claim(3)) == outcome(b"new")
    journal.close()


async def test_the_second_version_goes_on(place: str) -> None:
    """Calls get their numbers, and stored answers those of their calls."""
    journal_id = await fill(place)
    change(place, SECOND, 2)
    await check(place, journal_id)


async def test_the_first_version_goes_on(tmp_path: Path) -> None:
    """A file of the version without workers is taken over likewise."""
    place = str(tmp_path / "journal.db")
    journal_id = await fill(place)
    change(place, SECOND + ";" + FIRST, 1)
    await check(place, journal_id)


async def test_an_older_version_in_use_is_left_alone(place: str) -> None:
    """Tables are not changed under a worker that has them open."""
    with_them = Journal.open(place)
    change(place, "", 2)
    with pytest.raises(JournalLocked, match="older version"):
        Journal.open(place)
    with_them.close()

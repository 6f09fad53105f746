"""Opening a journal: one process, an undamaged file, and nothing left open by a dead process."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from x402mw.core.errors import ConfigurationError
from x402mw.core.ids import ID_BYTES
from x402mw.core.keys import SEED_BYTES
from x402mw.provider.journal import rows
from x402mw.provider.journal.calls import recover
from x402mw.provider.journal.errors import JournalCorrupt
from x402mw.provider.journal.redemption import replace_identity
from x402mw.provider.journal.transaction import Transaction

SQLITE_SCHEME = "sqlite:///"


@dataclass(frozen=True, slots=True)
class Identity:
    """Which book this is: its id, the seed of its receipt key, and the ids it has given up."""

    journal: bytes
    receipt_seed: bytes
    replaced: frozenset[bytes]


def file_path(place: str) -> str:
    """Returns the path in a journal setting, which is a path or a `sqlite:///` URL."""
    if "://" not in place:
        return place
    if place.startswith(SQLITE_SCHEME):
        return place.removeprefix(SQLITE_SCHEME)
    scheme = urlsplit(place).scheme
    raise ConfigurationError(f"a journal in {scheme} is not supported yet; give a file's path")


def read_identity(transaction: Transaction) -> Identity:
    """Reads which book this is, and makes it one if the file is new."""
    found = transaction.select(rows.READ_JOURNALS)
    if not found:
        replace_identity(transaction, *new_identity())
        found = transaction.select(rows.READ_JOURNALS)
    replaced = frozenset(journal for journal, _, gone in found if gone)
    ((journal, seed),) = [(journal, seed) for journal, seed, gone in found if not gone]
    return Identity(journal, seed, replaced)


def new_identity() -> tuple[bytes, bytes]:
    """Makes a journal id and the seed of a receipt key."""
    return os.urandom(ID_BYTES), os.urandom(SEED_BYTES)


def read_settings(transaction: Transaction) -> Mapping[str, str]:
    """Reads all settings."""
    return dict(transaction.select(rows.READ_SETTINGS))


def resume(transaction: Transaction) -> int:
    """Settles calls that a dead process left open, then checks that the totals are the rows' sums.

    Returns the number of calls settled, or raises `JournalCorrupt`.
    """
    settled = recover(transaction)
    sums = transaction.select(rows.READ_SUMS)
    totals = transaction.totals
    # Nothing is reserved any more, for no call is open.
    if sums != [(totals.unredeemed, totals.outcome_bytes, 0)]:
        raise JournalCorrupt("the journal's totals are not the sums of its rows; restore a backup")
    return settled

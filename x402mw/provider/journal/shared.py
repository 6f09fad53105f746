"""What all workers of a journal have in common, and each keeps in memory.

Whoever changes any of it raises `generation` in the totals, which every batch reads first: so a
worker never decides by what another one has already changed.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from x402mw.core.ids import ID_BYTES
from x402mw.core.keys import SEED_BYTES
from x402mw.provider.journal import rows
from x402mw.provider.journal.store import Store

CHANGES_CURSOR = "changes_cursor"
UNMET_SERIAL = "unmet_serial"
SESSIONS_FORGOTTEN = "sessions_forgotten_until"


@dataclass(frozen=True, slots=True)
class Shared:
    """Which book this is: its id, the seed of its receipt key, the ids it gave up; and settings."""

    generation: int
    journal: bytes
    receipt_seed: bytes
    replaced: frozenset[bytes]
    settings: Mapping[str, str]

    @property
    def changes_cursor(self) -> int:
        """Up to where the escrow's changes have been taken over."""
        return int(self.settings.get(CHANGES_CURSOR, "0"))

    @property
    def sessions_forgotten_until(self) -> int:
        """The latest `claim_until` of a pruned session, in seconds."""
        return int(self.settings.get(SESSIONS_FORGOTTEN, "0"))

    @property
    def unmet_serial(self) -> int | None:
        """The serial at which the first worker found this book; None once the escrow was met.

        Until then whatever the escrow has seen above it was not shown by these workers.
        """
        found = self.settings.get(UNMET_SERIAL, "")
        return int(found) if found else None


def read_shared(store: Store, generation: int) -> Shared:
    """Reads it within a transaction; a book that is new gets its identity here."""
    journals = store.select(rows.READ_JOURNALS)
    if not journals:
        store.select(rows.ADD_JOURNAL, new_identity())
        return read_shared(store, generation)
    replaced = frozenset(journal for journal, _, gone in journals if gone)
    ((journal, seed),) = [(journal, seed) for journal, seed, gone in journals if not gone]
    return Shared(generation, journal, seed, replaced, dict(store.select(rows.READ_SETTINGS)))


def new_identity() -> tuple[bytes, bytes]:
    """Makes a journal id and the seed of a receipt key."""
    return os.urandom(ID_BYTES), os.urandom(SEED_BYTES)

"""The provider's book: one SQLite file, one writer thread, group commit."""

from x402mw.provider.journal.calls import Admitted, SessionView, Settled
from x402mw.provider.journal.errors import JournalCorrupt, JournalLocked, JournalUnavailable
from x402mw.provider.journal.journal import Journal

__all__ = [
    "Admitted",
    "Journal",
    "JournalCorrupt",
    "JournalLocked",
    "JournalUnavailable",
    "SessionView",
    "Settled",
]

"""The provider's book, shared by all its workers: a writer thread in each, group commit."""

from x402mw.provider.journal.calls import Admitted, SessionView, Settled
from x402mw.provider.journal.errors import JournalCorrupt, JournalLocked, JournalUnavailable
from x402mw.provider.journal.journal import Journal
from x402mw.provider.journal.redemption import Due, Item, Refusal, Report

__all__ = [
    "Admitted",
    "Due",
    "Item",
    "Journal",
    "JournalCorrupt",
    "JournalLocked",
    "JournalUnavailable",
    "Refusal",
    "Report",
    "SessionView",
    "Settled",
]

"""What can be wrong with a journal."""

from x402mw.core.errors import ConfigurationError, LocalError


class JournalLocked(ConfigurationError):
    """A process of an older version has this journal open, which shares it with no other."""

    code = "journal_locked"


class JournalCorrupt(ConfigurationError):
    """The journal's file is damaged, or is not a journal; found when opening, never later."""

    code = "journal_corrupt"


class JournalUnavailable(LocalError):
    """The journal could not be written (disk full, locked, closed): nothing may be served.

    The operation left no trace.
    """

    code = "journal_unavailable"

"""What an outage does to deadlines: whoever could not act while we were down gets time (T5)."""

from x402mw.escrow.rules.values import Escrow

UP_GRACE_SECONDS = 600
"""After an outage every deadline leaves at least this long to act."""


def effective_deadline(deadline: int, up_since: int) -> int:
    """When a deadline really applies, where the escrow came up at `up_since` (Unix seconds)."""
    return max(deadline, up_since + UP_GRACE_SECONDS)


def is_due(escrow: Escrow, now: int, up_since: int) -> bool:
    """Tells whether time has something to do to a live escrow (T1: valid iff now < deadline)."""
    return escrow.due_at is not None and now >= effective_deadline(escrow.due_at, up_since)

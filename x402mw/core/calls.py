"""The journal's rows of (session, seq): what became of one logical request.

Unique, so that of all vouchers signed for one request at most one is ever admitted
(`docs/protocol.md`, Checks).
"""

from dataclasses import dataclass
from enum import StrEnum

from x402mw.core.amounts import ZERO, Atomic


class CallState(StrEnum):
    """How far a call has come: admitted, its answer begun, its price final."""

    OPEN = "open"
    STARTED = "started"
    SETTLED = "settled"


@dataclass(frozen=True, slots=True)
class Outcome:
    """An answer kept for identical retries; `credentials` hashes who may have it."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    credentials: bytes


@dataclass(frozen=True, slots=True)
class Call:
    """An admitted request: the journal's row of (session, seq). Amounts are atomic units."""

    session: bytes
    seq: int
    commitment: bytes
    amount: Atomic
    state: CallState = CallState.OPEN
    charge: Atomic = ZERO
    outcome: Outcome | None = None

"""What an entry notes about the state it led to, because nobody could see it from the entry alone.

Pure, and decided inside the transaction: low, exhausted, and how an escrow ended.
"""

from collections.abc import Mapping
from typing import Any

from x402mw.escrow.rules.values import Escrow, Phase

LOW, EXHAUSTED, ENDED = "low_balance", "exhausted", "ended"


def mark(before: Escrow, after: Escrow, data: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Adds to what an entry says what its change of an escrow led to."""
    left = after.amount - after.released - after.refunded
    # Nearly every change of a batch ends here.
    if left and left > (after.low_balance or 0):
        return data
    marks = _marks(before, after, left)
    return {**(data or {}), **marks} if marks else data


def _marks(before: Escrow, after: Escrow, left: int) -> dict[str, Any]:
    if after.phase is Phase.ENDED:
        return {} if before.phase is Phase.ENDED else {ENDED: after.close_reason}
    if before.remaining <= left:
        return {}
    marks = {LOW: True} if before.remaining > (after.low_balance or 0) > 0 else {}
    return marks if left else {**marks, EXHAUSTED: True}

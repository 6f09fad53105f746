"""What a wallet may spend, as its owner says it and as it is counted."""

from dataclasses import dataclass

from x402mw.core.amounts import Atomic, display, to_atomic
from x402mw.core.errors import LimitExceeded


@dataclass(frozen=True, slots=True)
class Limits:
    """What a wallet may spend, in display units such as "0.01"; None is no limit of that kind.

    `per_request` and `total` bound charges and open calls, and `total` also what sessions that were
    cut short leave signed and unused. `session` bounds one session. `max_open` bounds what one
    provider may have signed and not yet accounted for (default: half of what the session was opened
    with).
    """

    per_request: str
    total: str
    session: str | None = None
    max_open: str | None = None


@dataclass(frozen=True, slots=True)
class Bounds:
    """`Limits` in atomic units."""

    per_request: Atomic
    total: Atomic
    session: Atomic | None
    max_open: Atomic | None

    @classmethod
    def of(cls, limits: Limits) -> "Bounds":
        """Reads limits, or raises `AmountInvalid`."""
        return cls(
            to_atomic(limits.per_request),
            to_atomic(limits.total),
            None if limits.session is None else to_atomic(limits.session),
            None if limits.max_open is None else to_atomic(limits.max_open),
        )


def exceeded(limit: str, bound: int, amount: int) -> LimitExceeded:
    """The refusal by one limit, `bound`, of a call of `amount`."""
    return LimitExceeded(
        limit, f"a call of up to {display(amount)} would break the limit {limit} = {display(bound)}"
    )

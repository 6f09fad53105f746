"""What is measured, and the one interface through which figures leave.

Not to be confused with the meter of a call, which counts what a buyer pays for: these figures are
for operators, and nothing depends on them. Where nobody listens there is None in the place of a
`Telemetry`, and that is all it costs. The measures are listed in `docs/operations.md`.

Labels are few and their values are known beforehand: route templates, codes, names of operations.
Never ids, paths, addresses or anything a stranger chose.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from x402mw.core.amounts import USDC

UNITS = f"{{{USDC.code} units}}"
"""Amounts of money are whole atomic units; the asset's label says of what."""
SECONDS = "s"


@dataclass(frozen=True, slots=True)
class Measure:
    """One thing that is measured. `unit` is written as UCUM has it: "s", or "{call}"."""

    name: str
    unit: str
    description: str


class Telemetry(Protocol):
    """Takes figures. Its methods are called from several threads, and must not block."""

    def add(self, measure: Measure, amount: int, /, **labels: str) -> None:
        """Adds to a counter."""

    def record(self, measure: Measure, seconds: float, /, **labels: str) -> None:
        """Takes down how long something took."""

    def watch(self, measure: Measure, read: Callable[[], float], /) -> Callable[[], None]:
        """Reads a gauge whenever somebody asks for it; returns what ends that."""


class Shielded:
    """A `Telemetry` whose failures reach nobody who handles money: `tell` hears the first one."""

    def __init__(self, inner: Telemetry, tell: Callable[[Exception], None]) -> None:
        self._inner = inner
        self._tell: Callable[[Exception], None] | None = tell

    def add(self, measure: Measure, amount: int, /, **labels: str) -> None:
        """Adds to a counter, if that works."""
        try:
            self._inner.add(measure, amount, **labels)
        except Exception as error:
            self._failed(error)

    def record(self, measure: Measure, seconds: float, /, **labels: str) -> None:
        """Takes down how long something took, if that works."""
        try:
            self._inner.record(measure, seconds, **labels)
        except Exception as error:
            self._failed(error)

    def watch(self, measure: Measure, read: Callable[[], float], /) -> Callable[[], None]:
        """Has a gauge read, if that works."""
        try:
            return self._inner.watch(measure, read)
        except Exception as error:
            self._failed(error)
            return _nothing

    def _failed(self, error: Exception) -> None:
        tell, self._tell = self._tell, None
        if tell is not None:
            tell(error)


def shield(telemetry: Telemetry | None, tell: Callable[[Exception], None]) -> Telemetry | None:
    """Shields what an operator passed in; None stays None."""
    return None if telemetry is None else Shielded(telemetry, tell)


def _nothing() -> None:
    return None


# The provider.

REQUESTS = Measure(
    "x402mw.provider.requests",
    "{request}",
    "Requests of priced routes, by what became of them: paid, replayed, challenged, refused",
)
REFUSALS = Measure("x402mw.provider.refusals", "{request}", "Payments refused, by reason")
CHARGED = Measure("x402mw.provider.charged", UNITS, "What calls were charged")
HANDLER_SECONDS = Measure(
    "x402mw.provider.handler.duration", SECONDS, "From a paid call's admission to its end"
)
JOURNAL_SECONDS = Measure(
    "x402mw.provider.journal.duration", SECONDS, "How long a call waits until its row is durable"
)
OPEN_CALLS = Measure("x402mw.provider.open_calls", "{call}", "Paid calls that run right now")
UNREDEEMED = Measure(
    "x402mw.provider.unredeemed", UNITS, "What would be lost if the escrow never came back"
)
REDEMPTION_LAG = Measure(
    "x402mw.provider.redemption.lag", SECONDS, "For how long the oldest money owed has waited"
)
REDEEMED = Measure("x402mw.provider.redeemed", UNITS, "What the escrow accepted")
REDEMPTIONS = Measure(
    "x402mw.provider.redemptions", "{session}", "Sessions handed in, accepted or refused"
)
REDEMPTION_SECONDS = Measure(
    "x402mw.provider.redemption.duration", SECONDS, "How long the escrow took for a batch"
)
ESCROW_AWAY = Measure(
    "x402mw.provider.escrow_away", "{state}", "One while the escrow is away or takes no money in"
)

# The escrow.

OPERATION_SECONDS = Measure(
    "x402mw.escrow.operation.duration", SECONDS, "Requests of the API, by operation and outcome"
)

# The buyer.

CALLS = Measure(
    "x402mw.client.calls", "{call}", "Calls that were to be paid, by what became of them"
)
SPENT = Measure("x402mw.client.spent", UNITS, "What calls were charged")
RETRIES = Measure("x402mw.client.retries", "{request}", "Payments sent again")
SESSIONS = Measure("x402mw.client.sessions", "{session}", "Sessions opened")
LOCKED = Measure("x402mw.client.locked", UNITS, "What was locked by opening and topping up")

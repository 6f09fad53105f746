"""What happens to a wallet's money, told to its log and its figures.

The fields of a record (`extra`) and the labels of a figure are those of `docs/operations.md`. None
of them is ever a key, token, voucher, header or query.
"""

import logging
from collections.abc import Callable

from x402mw.core import telemetry as figures
from x402mw.core.amounts import USDC, Atomic, display
from x402mw.core.errors import (
    AccountsDiffer,
    LimitExceeded,
    PaymentOutcomeUnknown,
    PaymentRefused,
    X402mwError,
)
from x402mw.core.telemetry import Telemetry, shield
from x402mw_client.sessions import Call, Paid, Session

log = logging.getLogger("x402mw.client")


class Events:
    """One wallet's events; `on_payment` is called with each settled `Paid`."""

    def __init__(
        self,
        telemetry: Telemetry | None = None,
        on_payment: Callable[[Paid], None] | None = None,
    ) -> None:
        self._telemetry = shield(telemetry, _tell_telemetry)
        self._on_payment = on_payment

    def paid(self, call: Call) -> None:
        """The charge of a call is known; it may be nothing."""
        charge = call.charge or Atomic(0)
        if self._telemetry is not None:
            outcome = "paid" if charge else "not_charged"
            self._telemetry.add(figures.CALLS, 1, outcome=outcome)
            self._telemetry.add(figures.SPENT, charge, asset=USDC.code)
        if log.isEnabledFor(logging.INFO):
            name = call.session.name
            text = f"paid {display(charge)} for {call.url} ({name})"
            tell(logging.INFO, "paid", text, session=name, amount=charge, asset=USDC.code)
        if self._on_payment is not None:
            try:
                self._on_payment(call.paid)
            except Exception as error:
                # The call was paid: its answer goes to the caller all the same.
                text = f"on_payment failed: {type(error).__name__}"
                tell(logging.ERROR, "on_payment_failed", text, session=call.session.name)

    def resent(self, origin: str) -> None:
        """An answer was lost, and the same payment is sent again."""
        if self._telemetry is not None:
            self._telemetry.add(figures.RETRIES, 1)
        tell(logging.INFO, "payment_resent", f"sending a payment to {origin} again", origin=origin)

    def opened(self, session: Session) -> None:
        """A session was opened."""
        if self._telemetry is not None:
            self._telemetry.add(figures.SESSIONS, 1)
        self._locked("session_opened", "opened", session, session.deposit)

    def topped_up(self, session: Session, more: Atomic) -> None:
        """A session has so much more."""
        self._locked("session_topped_up", "topped up", session, more)

    def _locked(self, event: str, verb: str, session: Session, amount: Atomic) -> None:
        if self._telemetry is not None:
            self._telemetry.add(figures.LOCKED, amount, asset=USDC.code)
        text = f"{verb} session {session.name}: it has {display(session.deposit)}"
        tell(logging.INFO, event, text, session=session.name, amount=amount, asset=USDC.code)

    def ended(self, origin: str, error: X402mwError) -> None:
        """A call was not paid as it should be."""
        if self._telemetry is not None:
            self._telemetry.add(figures.CALLS, 1, outcome=error.code)
        level, event, reason = _judge(error)
        text = f"a call to {origin} ended: {error}"
        tell(level, event, text, origin=origin, reason=reason)


def _judge(error: X402mwError) -> tuple[int, str, str]:
    match error:
        case LimitExceeded():
            return logging.INFO, "limit_reached", error.limit
        case PaymentRefused():
            return logging.INFO, "payment_refused", error.reason
        case PaymentOutcomeUnknown():
            return logging.WARNING, "outcome_unknown", error.code
        case AccountsDiffer():
            return logging.ERROR, "accounts_differ", error.code
        case _:
            return logging.WARNING, "call_failed", error.code


def tell(level: int, event: str, text: str, **fields: object) -> None:
    """Writes one record."""
    log.log(level, "%s", text, extra={"event": event, **fields})


def _tell_telemetry(error: Exception) -> None:
    tell(logging.ERROR, "telemetry_failed", f"figures are lost: {type(error).__name__}")

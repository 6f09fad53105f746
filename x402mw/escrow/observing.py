"""What happens at an escrow, told to its log and its figures: one record for each request.

The fields and labels are those of `docs/operations.md`. None of them is ever a key, a token, a body
or a path of a request.
"""

import logging
from time import perf_counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from x402mw.core.telemetry import OPERATION_SECONDS, Telemetry, shield

log = logging.getLogger("x402mw.escrow")

REASON = "x402mw.reason"
"""The key of the scope under which the code of a refusal is left for this file."""
UNKNOWN = "-"
REFUSED, FAILED = 400, 500
_LEVELS = {"ok": logging.DEBUG, "refused": logging.INFO, "failed": logging.ERROR}


class Observed:
    """Tells of each request which operation it was, how it ended, and how long it took."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry | None = None) -> None:
        self._app = app
        self._telemetry = shield(telemetry, _tell_telemetry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes everything through, and takes note."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, since = FAILED, perf_counter()

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        finally:
            self._tell(scope, status, perf_counter() - since)

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        # The router leaves the function that answered: a word of ours, whatever was asked for.
        operation = getattr(scope.get("endpoint"), "__name__", UNKNOWN)
        outcome = "ok" if status < REFUSED else "refused" if status < FAILED else "failed"
        if self._telemetry is not None:
            labels = {"operation": operation, "outcome": outcome}
            self._telemetry.record(OPERATION_SECONDS, seconds, **labels)
        level = _LEVELS[outcome]
        if log.isEnabledFor(level):
            fields = {
                "event": "operation",
                "operation": operation,
                "status": status,
                "reason": scope.get(REASON, ""),
                "seconds": round(seconds, 6),
            }
            log.log(level, "%s: %d %s", operation, status, fields["reason"], extra=fields)


def _tell_telemetry(error: Exception) -> None:
    more = {"event": "telemetry_failed"}
    log.error("figures are lost: %s", type(error).__name__, extra=more)

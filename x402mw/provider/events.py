"""What happens at a provider, told to its log and its figures: one method for each event.

The fields of a record (`extra`) and the labels of a figure are those of `docs/operations.md`. None
of them is ever a key, token, voucher, signature, path or header of a request.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from time import perf_counter

from x402mw.core import telemetry as figures
from x402mw.core.amounts import USDC, Atomic, display
from x402mw.core.ids import ESCROW, format_id
from x402mw.core.telemetry import Measure, Telemetry, shield
from x402mw.provider.answers import ServedRoute

log = logging.getLogger("x402mw.provider")

CLOSED_REMEMBERED_MAX = 1000
SERVER_ERROR = 500
NOT_SOLD = "-"
"""The route of what is refused before a route is known, in figures and records."""


class Events:
    """One provider's events. Until `begin` and after `end` they are only logged."""

    def __init__(self, telemetry: Telemetry | None = None) -> None:
        self._telemetry = shield(telemetry, _tell_telemetry)
        self._closed: OrderedDict[bytes, None] = OrderedDict()
        self._unwatch: list[Callable[[], None]] = []
        self._journal_away = self._escrow_away = False
        self.telemetry: Telemetry | None = None

    def begin(self, gauges: Mapping[Measure, Callable[[], float]]) -> None:
        """Starts to pass figures on, and has these gauges read."""
        self.telemetry = told = self._telemetry
        if told is not None:
            self._unwatch = [told.watch(measure, read) for measure, read in gauges.items()]

    def end(self) -> None:
        """Passes no figures on any more."""
        self.telemetry = None
        for unwatch in self._unwatch:
            unwatch()

    def now(self) -> float:
        """A moment to measure durations from; 0 where nobody listens."""
        return 0.0 if self.telemetry is None else perf_counter()

    # Requests.

    def challenged(self, served: ServedRoute) -> None:
        """A request without payment was told the terms."""
        if self.telemetry is not None:
            self.telemetry.add(figures.REQUESTS, 1, route=name(served), outcome="challenged")

    def refused(self, served: ServedRoute | None, status: int, reason: str) -> None:
        """A payment was refused."""
        route = name(served)
        if self.telemetry is not None:
            self.telemetry.add(figures.REQUESTS, 1, route=route, outcome="refused")
            self.telemetry.add(figures.REFUSALS, 1, route=route, reason=reason)
        level = logging.INFO if status >= SERVER_ERROR else logging.DEBUG
        text = f"refused a request of {route}: {reason}"
        _tell(level, "refused", text, route=route, status=status, reason=reason)

    def replayed(self, served: ServedRoute) -> None:
        """An identical retry was given the stored answer."""
        route = name(served)
        if self.telemetry is not None:
            self.telemetry.add(figures.REQUESTS, 1, route=route, outcome="replayed")
        _tell(logging.DEBUG, "replayed", f"gave a stored answer of {route} again", route=route)

    def admitted(self, session: bytes, *, first: bool, since: float) -> None:
        """A call was admitted, which took from `since` until now."""
        if self.telemetry is not None:
            self._waited("admit", since)
        if self._journal_away:
            self._journal_away = False
            _tell(logging.INFO, "journal_back", "the journal can be used again")
        if first:
            shown = format_id(ESCROW, session)
            _tell(logging.INFO, "session_first_seen", f"first call of {shown}", session=shown)

    def charged(self, served: ServedRoute, session: bytes, charge: Atomic, since: float) -> None:
        """A call was settled, which took from `since` until now."""
        if self.telemetry is not None:
            self._waited("settle", since)
            asset = served.offer.terms.asset
            self.telemetry.add(figures.CHARGED, charge, route=name(served), asset=asset)
        if log.isEnabledFor(logging.DEBUG):
            route, shown = name(served), format_id(ESCROW, session)
            text = f"charged {display(charge)} for a call of {route}"
            fields = {"route": route, "session": shown, "amount": charge, "asset": USDC.code}
            _tell(logging.DEBUG, "charged", text, **fields)

    def _waited(self, operation: str, since: float) -> None:
        if self.telemetry is not None:
            seconds = perf_counter() - since
            self.telemetry.record(figures.JOURNAL_SECONDS, seconds, operation=operation)

    def served(self, served: ServedRoute, since: float) -> None:
        """A paid call ended, which began at `since`."""
        if self.telemetry is not None:
            route = name(served)
            self.telemetry.add(figures.REQUESTS, 1, route=route, outcome="paid")
            self.telemetry.record(figures.HANDLER_SECONDS, perf_counter() - since, route=route)

    def stopped(self, served: ServedRoute, cause: str) -> None:
        """A paid call was ended by us: its time was over, or the journal was away."""
        route = name(served)
        text = f"a call of {route} was stopped: {cause}"
        _tell(logging.WARNING, "call_stopped", text, route=route, reason=cause)

    def journal_unavailable(self) -> None:
        """The journal could not be read or written; told once, until it can."""
        if not self._journal_away:
            self._journal_away = True
            _tell(logging.ERROR, "journal_unavailable", "the journal cannot be used now")

    # Sessions and redemption.

    def closing(self, session: bytes) -> None:
        """A buyer closes its session."""
        shown = format_id(ESCROW, session)
        text = f"{shown} takes no more calls: its buyer closes it"
        _tell(logging.INFO, "session_closing", text, session=shown)

    def closed(self, session: bytes, redeemed: Atomic) -> None:
        """A session has ended at the escrow; told once, however often the escrow says it."""
        if session in self._closed:
            return
        self._closed[session] = None
        if len(self._closed) > CLOSED_REMEMBERED_MAX:
            self._closed.popitem(last=False)
        shown = format_id(ESCROW, session)
        fields = {"session": shown, "amount": redeemed, "asset": USDC.code}
        text = f"{shown} is closed; it paid {display(redeemed)}"
        _tell(logging.INFO, "session_closed", text, **fields)

    def redeemed(self, *, accepted: int, refused: int, amount: int, seconds: float) -> None:
        """A batch was handed in: how many sessions, how much more the escrow paid, how long."""
        if self.telemetry is not None:
            self.telemetry.record(figures.REDEMPTION_SECONDS, seconds)
            self.telemetry.add(figures.REDEEMED, amount, asset=USDC.code)
            self.telemetry.add(figures.REDEMPTIONS, accepted, outcome="accepted")
            self.telemetry.add(figures.REDEMPTIONS, refused, outcome="refused")
        fields = {"accepted": accepted, "refused": refused, "amount": amount, "asset": USDC.code}
        text = f"redeemed {display(amount)} of {accepted} sessions"
        _tell(logging.INFO, "redeemed", text, **fields, seconds=round(seconds, 6))

    def not_redeemed(self, session: bytes, code: str) -> None:
        """The escrow refused to redeem a session."""
        shown = format_id(ESCROW, session)
        text = f"the escrow did not redeem session {shown}: {code}"
        _tell(logging.ERROR, "redemption_refused", text, session=shown, reason=code)

    def escrow_away(self, error: Exception) -> None:
        """The escrow could not be used; told once, until it can."""
        if not self._escrow_away:
            self._escrow_away = True
            code = str(getattr(error, "code", "timeout"))
            text = f"the escrow could not be used: {error}"
            _tell(logging.WARNING, "escrow_away", text, reason=code)

    def escrow_back(self) -> None:
        """The escrow could be used; told if it was away."""
        if self._escrow_away:
            self._escrow_away = False
            _tell(logging.INFO, "escrow_back", "the escrow can be used again")


def name(served: ServedRoute | None) -> str:
    """A route as figures and records name it."""
    return NOT_SOLD if served is None else f"{served.route.method} {served.route.template}"


def _tell(level: int, event: str, text: str, **fields: object) -> None:
    log.log(level, "%s", text, extra={"event": event, **fields})


def _tell_telemetry(error: Exception) -> None:
    _tell(logging.ERROR, "telemetry_failed", f"figures are lost: {type(error).__name__}")

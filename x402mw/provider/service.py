"""A provider while it runs: its journal, its link to the escrow, and the book it judges by.

Made by `Provider.start`, shared by every request. Nothing here belongs to one request alone; that
is `responder.PaidCall`.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from x402mw.core import telemetry as figures
from x402mw.core.amounts import Atomic
from x402mw.core.gate import Book, Outcome, Standing
from x402mw.provider.answers import ServedRoute
from x402mw.provider.events import Events
from x402mw.provider.journal import Admitted, Journal, JournalUnavailable, Settled
from x402mw.provider.link import EscrowLink
from x402mw.provider.redeemer import Redeemer
from x402mw.provider.request import Origins
from x402mw.provider.turns import Turns

log = logging.getLogger("x402mw.provider")

FREE_CALLS_PER_MINUTE = 60
QUOTA_SESSIONS_MAX = 10_000
SETTLE_RETRY_SECONDS = 1.0
STOP_SECONDS = 5.0


class Quota:
    """Counts what a session got for nothing: failures after the work, and control calls.

    It lives in memory only: losing it at a restart costs a minute's allowance and no money.
    """

    def __init__(self, per_minute: int) -> None:
        """`per_minute` free failures and control calls are allowed to each session."""
        self._per_minute = per_minute
        self._minutes: OrderedDict[bytes, tuple[int, int]] = OrderedDict()

    def spend(self, session: bytes, now: float, count: int = 1) -> None:
        """Counts one; -1 gives one back."""
        minute, before = self._current(session, now)
        self._minutes[session] = (minute, before + count)
        self._minutes.move_to_end(session)
        if len(self._minutes) > QUOTA_SESSIONS_MAX:
            self._minutes.popitem(last=False)

    def exhausted(self, session: bytes, now: float) -> bool:
        """Tells whether the session has had its share of this minute."""
        return self._current(session, now)[1] >= self._per_minute

    def _current(self, session: bytes, now: float) -> tuple[int, int]:
        minute = int(now // 60)
        found = self._minutes.get(session, (minute, 0))
        return found if found[0] == minute else (minute, 0)


@dataclass(slots=True)
class Service:
    """What requests need.

    `book` and `served` (the priced routes by method and template) are replaced as a whole when the
    journal is; requests read each of them once.
    """

    journal: Journal
    link: EscrowLink
    redeemer: Redeemer
    origins: Origins
    unredeemed_max: Atomic
    quota: Quota
    clock: Callable[[], float]
    events: Events = field(default_factory=Events)
    book: Book = field(init=False)
    served: dict[tuple[str, str], ServedRoute] = field(init=False)
    running: set[tuple[bytes, int]] = field(default_factory=set)
    turns: Turns = field(default_factory=Turns)
    _tasks: set[asyncio.Future[Any]] = field(default_factory=set)
    _stopping: bool = False

    def begin_figures(self) -> None:
        """Starts to pass figures on: what happens from now on, and how things stand."""
        self.events.begin(
            {
                figures.OPEN_CALLS: lambda: len(self.running),
                figures.UNREDEEMED: lambda: self.journal.unredeemed,
                figures.REDEMPTION_LAG: lambda: self.redeemer.lag,
                figures.ESCROW_AWAY: lambda: int(self.link.away or self.redeemer.failing),
            }
        )

    def standing(self, session: bytes, unredeemed: Atomic) -> Standing:
        """What bears on admission besides the rows; called inside the write transaction."""
        return Standing(
            throttled=self.quota.exhausted(session, self.clock()),
            escrow_away=self.link.away or self.redeemer.failing,
            clock_off=self.link.clock_off,
            unredeemed=unredeemed,
            unredeemed_max=self.unredeemed_max,
        )

    async def settle(
        self, admitted: Admitted, *, used: int | None, outcome: Outcome | None, begun: bool
    ) -> Settled:
        """Settles a call durably; if the journal cannot write now, goes on trying behind.

        Raises `JournalUnavailable` then: an answer that has not `begun` must not be served, and
        will cost nothing; what was delivered of one that has is still charged.
        """
        try:
            settled = await self.journal.settle(admitted, used=used, outcome=outcome)
        except JournalUnavailable:
            if not self._stopping:
                later = self._settle_later(admitted, used if begun else None)
                self.keep(asyncio.ensure_future(later))
            raise
        if settled.charge == 0:
            self.quota.spend(admitted.session, self.clock())
        elif begun:
            # The answer went out without its figure: the buyer has to ask for it.
            self.quota.spend(admitted.session, self.clock(), -1)
        if self.journal.unredeemed * 2 > self.unredeemed_max:
            self.redeemer.nudge()
        return settled

    async def _settle_later(self, admitted: Admitted, used: int | None) -> None:
        """Settles a call as soon as the journal can write again."""
        while True:
            await asyncio.sleep(SETTLE_RETRY_SECONDS)
            try:
                await self.journal.settle(admitted, used=used, outcome=None)
            except JournalUnavailable:
                more = {"event": "settlement_waits"}
                log.warning(
                    "the journal still cannot write; a call waits to be settled", extra=more
                )
            else:
                return

    def keep(self, task: asyncio.Future[Any]) -> None:
        """Holds a background task until it is done, so that it is not collected half-way."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """Stops what runs behind, hands in what is owed, and closes the journal."""
        self._stopping = True
        self.events.end()
        if self._tasks:
            # These settle calls; only what the journal will not take now is left to its recovery.
            _, late = await asyncio.wait(self._tasks, timeout=STOP_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self.redeemer.stop()
        await self.link.stop()
        self.journal.close()

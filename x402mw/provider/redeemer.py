"""Redeeming: one background task hands vouchers in, and learns what the escrow knows.

1. The escrow is contacted every few seconds; that contact tells whether it is away, and what
   changed there. The first one also tells whether this journal is a restored backup.
2. What is owed is sent by amount, by age, and always before the vouchers run out; at once when
   `nudge` says that much is open; the rest of a closing session when its last call has ended.
3. Each item has a verdict of its own. Without a clear verdict an item is neither redeemed nor
   refused: it is sent again, which can never count twice.
4. Every worker keeps in contact, so each knows whether the escrow is away. One of them redeems for
   all; any other does when it is nudged, asked for one session, or sees that it is getting late.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import groupby

from x402mw.core.amounts import Atomic
from x402mw.core.errors import EscrowRefused, EscrowUnavailable, X402mwError
from x402mw.core.sessions import SessionState
from x402mw.provider.events import Events
from x402mw.provider.journal import Due, Item, Journal, JournalUnavailable, Refusal, Report
from x402mw.provider.link import EscrowLink
from x402mw_client.operations import RedeemItem
from x402mw_client.records import Change, Verdict

ITEMS_MAX = 1000
CONTACT_SECONDS = 10.0
ROUND_SECONDS = 0.5
FIRST_CONTACT_SECONDS = 5.0
LAST_SECONDS = 5.0
BACKOFF_SECONDS_MAX = 30.0
BACKOFF_DOUBLINGS_MAX = 10
BY_AMOUNT = Atomic(1_000_000)
BY_AGE_SECONDS = 5
CLAIM_MARGIN_SECONDS = 120
"""A session is redeemed this long before `claim_until` at the latest: a minute, and one to try."""
LATE_SECONDS = 45
"""What should have been redeemed so long ago is redeemed by whatever worker sees it."""
NEVER = Atomic(2**63 - 1)

ENDED = frozenset({"released", "refunded", "settled"})
BATCH_REFUSED = frozenset({400, 413, 422})
"""Statuses by which the escrow refuses a batch as a whole for the sake of one item in it."""
UNCLEAR = "unclear"
FAILING = "redeeming_fails"
"""The setting by which the worker that redeems tells the others that it cannot."""

EVERYTHING = Due(amount=Atomic(1), age_seconds=0, margin_seconds=0)

log = logging.getLogger("x402mw.provider.redeemer")

Replaced = Callable[[], Awaitable[None]]


class Redeemer:
    """Redeems one journal's sessions. `by_amount` is atomic, `by_age` in seconds."""

    def __init__(
        self,
        journal: Journal,
        link: EscrowLink,
        *,
        by_amount: Atomic = BY_AMOUNT,
        by_age: float = BY_AGE_SECONDS,
        contact_seconds: float = CONTACT_SECONDS,
        round_seconds: float = ROUND_SECONDS,
        events: Events | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._journal = journal
        self._link = link
        self._rule = Due(by_amount, by_age, CLAIM_MARGIN_SECONDS)
        self._late = Due(NEVER, by_age + LATE_SECONDS, CLAIM_MARGIN_SECONDS - LATE_SECONDS)
        self._contact_seconds = contact_seconds
        self._round_seconds = round_seconds
        self._events = events or Events()
        self._clock = clock
        self._owed_since: int | None = None
        self._nudged = asyncio.Event()
        self._contacting = asyncio.Lock()
        self._contact_at = float("-inf")
        self._failures = 0
        self._on_replaced: Replaced | None = None
        self._told = journal.journal_id
        self._task: asyncio.Task[None] | None = None

    async def start(self, *, on_replaced: Replaced | None = None) -> None:
        """Tries a first contact, and goes on behind whether it succeeds or not.

        `on_replaced` is awaited when the journal has taken a new id, here or in another worker: it
        turned out to be a restored backup.
        """
        self._on_replaced = on_replaced
        try:
            async with asyncio.timeout(FIRST_CONTACT_SECONDS):
                await self.contact()
        except (X402mwError, TimeoutError) as error:
            self._events.escrow_away(error)
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Ends the task, and hands in what is owed if the escrow answers soon."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        try:
            async with asyncio.timeout(LAST_SECONDS):
                await self.redeem_all()
        except (X402mwError, TimeoutError) as error:
            more = {"event": "stopped_owing"}
            log.warning("stopping before everything could be redeemed: %s", error, extra=more)

    @property
    def failing(self) -> bool:
        """Whether the last round failed: then an escrow that answers still takes no money in."""
        return self._failures > 0 or bool(self._journal.setting(FAILING))

    @property
    def lag(self) -> float:
        """For how many seconds the oldest money owed has waited, as of the last round."""
        since = self._owed_since
        return 0.0 if since is None else max(0.0, self._clock() - since)

    def nudge(self) -> None:
        """Asks for everything owed to be redeemed now."""
        self._nudged.set()

    # The task.

    async def _run(self) -> None:
        while True:
            try:
                await self._round()
            except X402mwError as error:
                self._fail()
                self._events.escrow_away(error)
            except Exception:
                self._fail()
                log.exception("a round of redeeming failed", extra={"event": "redeeming_failed"})
            else:
                self._failures = 0
                self._events.escrow_back()
            await self._tell_failing()
            await self._pause()

    def _fail(self) -> None:
        """Has the next round begin with a contact, which tells whether the escrow is away."""
        self._failures += 1
        self._contact_at = float("-inf")

    async def _tell_failing(self) -> None:
        """Tells the other workers how redeeming goes, if that is ours and has changed."""
        told, failing = bool(self._journal.setting(FAILING)), self._failures > 0
        if self._journal.leads and told != failing:
            with contextlib.suppress(JournalUnavailable):
                await self._journal.set_setting(FAILING, "1" if failing else "")

    async def _round(self) -> None:
        contacted = not self._met or _now() - self._contact_at >= self._contact_seconds
        if contacted:
            await self.contact()
        await self._tell_replaced()
        # By a wrong clock nothing can be told to be due.
        all_of_it = self._nudged.is_set() or self._link.clock_off
        rule = EVERYTHING if all_of_it else self._rule
        if self._journal.leads or all_of_it:
            self._nudged.clear()
            await self._send(await self._journal.due(rule, ITEMS_MAX))
        elif contacted:
            # Whoever leads should have sent these; it may have been stopped.
            await self._send(await self._journal.due(self._late, ITEMS_MAX))
        if self._events.telemetry is not None:
            self._owed_since = await self._journal.owed_since()

    async def _pause(self) -> None:
        """Waits for the next round: a nudge shortens it, but not while the escrow is failing."""
        if self._failures:
            doublings = min(self._failures, BACKOFF_DOUBLINGS_MAX)
            longest = min(BACKOFF_SECONDS_MAX, self._round_seconds * 2**doublings)
            # Jitter, so that many providers do not all return in one moment.
            await asyncio.sleep(longest * random.uniform(0.5, 1))  # noqa: S311 (no secret)
            return
        await asyncio.sleep(self._round_seconds / 5)
        try:
            async with asyncio.timeout(self._round_seconds):
                await self._nudged.wait()
        except TimeoutError:
            return

    # Contact.

    async def contact(self) -> None:
        """Asks the escrow what changed, and takes it over."""
        async with self._contacting:
            await self._tell_replaced()
            await self._link.ensure_registered()
            while await self._take_changes():
                pass
            self._contact_at = _now()
        self._link.refresh_keys_in_time()

    async def _take_changes(self) -> bool:
        """Takes over one page of changes; tells whether there may be another."""
        journal = self._journal
        name, since, serial = journal.journal_id, journal.changes_cursor, journal.unmet_serial
        if serial is None:
            serial = journal.serial
        page = await self._link.contact(
            self._link.escrow.changes(since, name, serial, limit=ITEMS_MAX)
        )
        if page.next < since:
            raise EscrowUnavailable("the escrow's changes run backwards")
        reports = [_report_change(change) for change in page.changes]
        self._tell_closed(reports)
        if await journal.apply_changes(
            reports,
            journal=name,
            since=since,
            until=page.next if page.changes else since,
            serial=page.serial,
        ):
            await self._meet_anew()
            return False
        return len(page.changes) == ITEMS_MAX

    @property
    def _met(self) -> bool:
        """Whether any worker has met the escrow since the first of them came."""
        return self._journal.unmet_serial is None

    async def _meet_anew(self) -> None:
        """Makes the journal's new id known."""
        await self._tell_replaced()
        await self._link.ensure_registered()

    async def _tell_replaced(self) -> None:
        name = self._journal.journal_id
        if name != self._told:
            if self._on_replaced is not None:
                await self._on_replaced()
            self._told = name

    # Redeeming.

    async def redeem_session(self, session: bytes, *, final: bool) -> bool:
        """Redeems one session now; `final` also closes it, once it is closing and has no open call.

        Tells whether it is done. If not, the task behind goes on trying.
        """
        if self._failures and self._link.away:
            return False
        try:
            await self._meet()
            item = await self._journal.due_session(session, final=final)
            done = item is None or session in await self._send([item])
        except X402mwError as error:
            self._events.escrow_away(error)
            return False
        if not final:
            return done
        account = await self._journal.account(session)
        return account is not None and account.state is SessionState.CLOSED

    async def redeem_all(self) -> None:
        """Redeems everything owed, or raises what hindered it."""
        await self._meet()
        tried: set[bytes] = set()
        while items := await self._journal.due(EVERYTHING, ITEMS_MAX):
            if tried.issuperset(item.session for item in items):
                return
            tried.update(item.session for item in items)
            await self._send(items)

    async def _meet(self) -> None:
        if not self._met:
            await self.contact()

    async def _send(self, items: Sequence[Item]) -> set[bytes]:
        """Sends items, and takes over their verdicts; returns the sessions that were accepted."""
        accepted: set[bytes] = set()
        # Sessions of an id that this book has given up are redeemed under that id.
        for journal, group in groupby(sorted(items, key=_journal_of), key=_journal_of):
            accepted |= await self._send_batch(journal, list(group))
        return accepted

    async def _send_batch(self, journal: bytes, items: list[Item]) -> set[bytes]:
        lines = [_line(item) for item in items]
        since = _now()
        try:
            answer = await self._link.contact(
                self._link.escrow.redeem(journal, self._journal.serial, lines)
            )
        except EscrowRefused as error:
            if error.status not in BATCH_REFUSED:
                raise
            return await self._send_apart(journal, items, error)
        if len(answer.items) != len(items):
            raise EscrowUnavailable("the escrow did not answer item by item")
        verdicts = [_read(item, verdict) for item, verdict in zip(items, answer.items, strict=True)]
        accepted = await self._apply(verdicts)
        self._tell_batch(items, verdicts, _now() - since)
        return accepted

    def _tell_batch(
        self, items: Sequence[Item], verdicts: Sequence[Report | Refusal], seconds: float
    ) -> None:
        pairs = list(zip(items, verdicts, strict=True))
        more = [one.redeemed - item.redeemed for item, one in pairs if isinstance(one, Report)]
        self._events.redeemed(
            accepted=len(more),
            refused=len(pairs) - len(more),
            amount=sum(max(0, one) for one in more),
            seconds=seconds,
        )

    async def _send_apart(
        self, journal: bytes, items: list[Item], error: EscrowRefused
    ) -> set[bytes]:
        """Finds the item for whose sake a batch was refused, and redeems all others."""
        if len(items) == 1:
            # The batch was refused, not the item: that alone never writes anything off.
            return await self._apply([Refusal(items[0].session, f"batch_{error.reason}")])
        half = len(items) // 2
        first = await self._send_batch(journal, items[:half])
        return first | await self._send_batch(journal, items[half:])

    async def _apply(self, verdicts: Sequence[Report | Refusal]) -> set[bytes]:
        reports = [verdict for verdict in verdicts if isinstance(verdict, Report)]
        self._tell_closed(reports)
        refusals = [verdict for verdict in verdicts if isinstance(verdict, Refusal)]
        for refusal in refusals:
            self._events.not_redeemed(refusal.session, refusal.code)
        if await self._journal.apply_verdicts(reports, refusals):
            await self._meet_anew()
        return {report.session for report in reports}

    def _tell_closed(self, reports: Sequence[Report]) -> None:
        for report in reports:
            if report.ended:
                self._events.closed(report.session, report.redeemed)


def _journal_of(item: Item) -> bytes:
    return item.journal


def _line(item: Item) -> RedeemItem:
    if item.voucher is None:
        return RedeemItem(amount=item.amount, session=item.session, final=item.final)
    return RedeemItem(amount=item.amount, voucher=item.voucher, final=item.final)


def _read(item: Item, verdict: Verdict) -> Report | Refusal:
    """What a verdict says; one that makes no sense is neither yes nor no, and is asked again."""
    if not verdict.ok:
        return Refusal(item.session, verdict.code or UNCLEAR)
    if verdict.session != item.session or verdict.state is None:
        return Refusal(item.session, UNCLEAR)
    if verdict.redeemed is None or verdict.released is None:
        return Refusal(item.session, UNCLEAR)
    ended = verdict.state in ENDED
    return Report(item.session, verdict.redeemed, verdict.released, ended=ended)


def _report_change(change: Change) -> Report:
    return Report(
        change.session,
        change.redeemed,
        change.released,
        ended=change.state in ENDED,
        claim_until=change.claim_until or 0,
    )


def _now() -> float:
    return asyncio.get_running_loop().time()

"""The journal: a provider's book of sessions, calls and outcomes, shared by all its workers.

Nothing is served before its row is durable. Every method hands one operation to the writer thread,
so the event loop never waits for a disk.
"""

import asyncio
import atexit
import logging
import time
from collections.abc import Callable, Iterable
from functools import partial

from x402mw.core import gate
from x402mw.core.amounts import Atomic
from x402mw.core.errors import ConfigurationError
from x402mw.core.sessions import Account
from x402mw.provider.journal import calls, redemption, retention
from x402mw.provider.journal.calls import Admitted, SessionView, Settled
from x402mw.provider.journal.jobs import Operation, Result
from x402mw.provider.journal.opening import open_store
from x402mw.provider.journal.redemption import Due, Item, Refusal, Report
from x402mw.provider.journal.shared import CHANGES_CURSOR, UNMET_SERIAL, new_identity
from x402mw.provider.journal.store import Durability, RowRefused, StoreFailed
from x402mw.provider.journal.transaction import Needs, Transaction
from x402mw.provider.journal.writer import Writer

OUTCOME_BYTES_MAX = 256 * 1024 * 1024
VOID_RETRY_SECONDS = 1.0

log = logging.getLogger("x402mw.provider.journal")


class Journal:
    """One worker's open book. Make it with `open`, end it with `close`.

    Its methods may run in parallel.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        # Where nothing tells us of the end (a mounted app has no lifespan), the process does.
        atexit.register(self.close)

    @classmethod
    def open(
        cls,
        place: str,
        *,
        durability: Durability = "fsync",
        clock: Callable[[], float] = time.time,
        outcome_bytes_max: int = OUTCOME_BYTES_MAX,
    ) -> "Journal":
        """Opens or creates the journal at `place`, beside whatever other workers have it open.

        `place` is a path or a `sqlite:///` URL. Raises `JournalLocked` if an older version has it,
        `JournalCorrupt` if it is damaged, and `ConfigurationError` for any other reason it cannot
        be used. Blocks: call it when starting.
        """
        writer = Writer(clock, outcome_bytes_max=outcome_bytes_max)
        try:
            writer.open(partial(open_store, place, durability))
        except (RowRefused, StoreFailed) as error:
            raise ConfigurationError(f"the journal cannot be opened: {error}") from None
        return cls(writer)

    def close(self) -> None:
        """Commits what waits, settles what is open, and leaves; may be called again."""
        atexit.unregister(self.close)
        if self._writer.stopped:
            return
        self._writer.stop()

    # What is known without asking the database, as of this worker's last batch.

    @property
    def journal_id(self) -> bytes:
        """The 16 bytes behind `jr_...`."""
        return self._writer.shared.journal

    @property
    def receipt_seed(self) -> bytes:
        """The seed of the key that signs this journal's receipts."""
        return self._writer.shared.receipt_seed

    @property
    def replaced(self) -> frozenset[bytes]:
        """The ids this book has given up."""
        return self._writer.shared.replaced

    @property
    def serial(self) -> int:
        """The number of committed batches."""
        return self._writer.totals.serial

    @property
    def unmet_serial(self) -> int | None:
        """The serial that the first of the workers found; None once one has met the escrow."""
        return self._writer.shared.unmet_serial

    @property
    def unredeemed(self) -> Atomic:
        """What would be lost if the escrow never came back: charged or reserved, and not yet paid.

        Summed over all sessions that are not written off.
        """
        return self._writer.totals.unredeemed

    @property
    def leads(self) -> bool:
        """Whether this worker is the one that redeems for all."""
        return self._writer.leads

    def setting(self, key: str) -> str | None:
        """Returns a value that was kept with `set_setting`, by whatever worker."""
        return self._writer.shared.settings.get(key)

    async def set_setting(self, key: str, value: str) -> None:
        """Keeps a value for all workers, across restarts."""
        await self._do(lambda transaction: transaction.write_setting(key, value))

    # Calls.

    async def admit(
        self,
        claim: gate.Claim,
        *,
        offer: gate.Offer,
        book: gate.Book,
        standing: Callable[[Atomic], gate.Standing],
        credentials: bytes,
    ) -> Admitted | gate.Outcome:
        """Admits a bound claim durably, or returns its stored outcome, or raises `gate.Refused`.

        `standing` is given the unredeemed total at the moment of the decision; it runs in the
        writer thread. If the caller is cancelled meanwhile, the call is voided.
        """
        admit = partial(
            _admit, claim=claim, offer=offer, book=book, standing=standing, credentials=credentials
        )
        needs = Needs(claim.session, claim.seq)
        future = self._writer.submit(admit, needs=needs, lost=self._void)
        try:
            return await future
        except asyncio.CancelledError:
            # Cancelled between its admission and hearing of it: nobody else will void it.
            if not future.cancelled() and future.exception() is None:
                self._void(future.result())
            raise

    def _void(self, admitted: Admitted | gate.Outcome) -> None:
        """Frees a call whose caller went away before it heard of its admission."""
        if isinstance(admitted, Admitted) and not self._writer.stopped:
            void = partial(calls.settle, call=admitted, used=None, outcome=None)
            self._writer.submit(void).add_done_callback(partial(self._void_again, admitted))

    def _void_again(self, admitted: Admitted, voiding: asyncio.Future[Settled]) -> None:
        """Goes on trying while the journal cannot write: nothing else would free this call."""
        if voiding.exception() is not None:
            voiding.get_loop().call_later(VOID_RETRY_SECONDS, self._void, admitted)

    async def start(self, call: Admitted, mark: Atomic) -> None:
        """Notes durably that the answer begins: from now on a crash charges at least `mark`."""
        await self._for(call, partial(calls.start, call=call, mark=mark))

    async def mark(self, call: Admitted, used: int) -> None:
        """Notes durably what a started call has used so far, so that a crash charges it too."""
        await self._for(call, partial(calls.mark, call=call, used=used))

    async def settle(
        self, call: Admitted, *, used: int | None, outcome: gate.Outcome | None
    ) -> Settled:
        """Charges a call for what it used, or voids it (None), and keeps its answer, all at once.

        Happens once: a repeat changes nothing and returns the first charge, with today's totals.
        It is finished even if the caller is cancelled.
        """
        return await self._for(call, partial(calls.settle, call=call, used=used, outcome=outcome))

    async def lookup(self, session: bytes, seq: int) -> gate.Call | None:
        """Returns the call of (session, seq), if it is known."""
        return await self._do(partial(calls.lookup, session=session, seq=seq))

    # Sessions.

    async def account(self, session: bytes) -> Account | None:
        """Returns the account of a session, if it was ever used here."""

        def read(transaction: Transaction) -> Account | None:
            row = transaction.session(session)
            return row.account if row else None

        return await self._do(read)

    async def check_session(self, claim: gate.Claim) -> None:
        """Raises `Refused` if this session was used here and is forgotten."""
        await self._do(partial(calls.check_session, claim=claim))

    async def begin_close(self, claim: gate.Claim) -> SessionView:
        """Lets a session admit nothing more, durably; also one that was never used here."""
        return await self._do(partial(calls.begin_close, claim=claim))

    async def keep_terms(self, ids: Iterable[bytes]) -> dict[bytes, int]:
        """Makes `ids` the terms offered now; returns former ones still in grace, and since when."""
        return await self._do(partial(retention.keep_terms, ids=tuple(ids)))

    # Redemption.

    async def due(self, rule: Due, limit: int) -> list[Item]:
        """Returns up to `limit` sessions to redeem, durably noted as sent."""
        return await self._do(partial(redemption.due, rule=rule, limit=limit))

    async def owed_since(self) -> int | None:
        """Returns since when (seconds) the oldest money has been owed; None if nothing is."""
        return await self._do(redemption.owed_since)

    async def due_session(self, session: bytes, *, final: bool) -> Item | None:
        """Returns one session to redeem, durably noted as sent; None if there is nothing to send.

        A final item waits until the session is closing and no call is open.
        """
        return await self._do(partial(redemption.one, session=session, final=final))

    async def apply_verdicts(
        self, reports: Iterable[Report], refusals: Iterable[Refusal] = ()
    ) -> bool:
        """Takes over the escrow's verdicts; True if they prove this journal a restored backup.

        Then it has a new id and receipt key, and changes are read from the start.
        """

        def apply(transaction: Transaction) -> bool:
            redemption.apply_refusals(transaction, refusals)
            restored = redemption.apply_reports(transaction, reports, transaction.shared.journal)
            if restored:
                _replace_identity(transaction)
            return restored

        return await self._do(apply)

    async def apply_changes(
        self, reports: Iterable[Report], *, journal: bytes, since: int, until: int, serial: int
    ) -> bool:
        """Takes over a page of the escrow's changes; True if it proves a restored backup, likewise.

        The page was asked for by the id `journal`, behind the cursor `since`; what another worker
        has taken over meanwhile is passed by. `until` is its end, and `serial` the highest that the
        escrow has seen of this journal.
        """

        def apply(transaction: Transaction) -> bool:
            shared = transaction.shared
            if (shared.journal, shared.changes_cursor) != (journal, since):
                return False
            # Whatever a worker showed it had committed: only another life knew a higher one.
            known = shared.unmet_serial
            restored = serial > (transaction.totals.serial if known is None else known)
            restored |= redemption.apply_reports(transaction, reports, journal)
            if until != since:
                transaction.write_setting(CHANGES_CURSOR, str(until))
            if known is not None:
                transaction.write_setting(UNMET_SERIAL, "")
            if restored:
                _replace_identity(transaction)
            return restored

        return await self._do(apply)

    @property
    def changes_cursor(self) -> int:
        """Up to where the escrow's changes have been taken over."""
        return self._writer.shared.changes_cursor

    async def _for(self, call: Admitted, operation: Operation[Result]) -> Result:
        terms = call.terms.id if call.terms.metered else None
        return await self._writer.submit(operation, needs=Needs(call.session, call.seq, terms))

    async def _do(self, operation: Operation[Result]) -> Result:
        return await self._writer.submit(operation)


def _admit(
    transaction: Transaction,
    *,
    claim: gate.Claim,
    offer: gate.Offer,
    book: gate.Book,
    standing: Callable[[Atomic], gate.Standing],
    credentials: bytes,
) -> Admitted | gate.Outcome:
    if claim.token.journal in transaction.shared.replaced:
        raise gate.refused(claim, 409, "journal_replaced", "this journal was replaced")
    return calls.admit(
        transaction,
        claim,
        offer=offer,
        book=book,
        standing=standing(transaction.totals.unredeemed),
        credentials=credentials,
    )


def _replace_identity(transaction: Transaction) -> None:
    log.error(
        "this journal is a restored backup: it takes a new id, and its old sessions take no"
        " more calls; what they owe is still redeemed",
        extra={"event": "backup_restored"},
    )
    redemption.replace_identity(transaction, *new_identity())
    transaction.write_setting(CHANGES_CURSOR, "0")

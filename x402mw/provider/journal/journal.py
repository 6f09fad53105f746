"""The journal: a provider's book of sessions, calls and outcomes, in one SQLite file.

Nothing is served before its row is durable. Every method hands one operation to the writer thread,
so the event loop never waits for a disk.
"""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Iterable
from functools import partial

from x402mw.core import gate
from x402mw.core.amounts import Atomic
from x402mw.core.errors import ConfigurationError
from x402mw.core.sessions import Account
from x402mw.provider.journal import calls, redemption, retention
from x402mw.provider.journal.calls import Admitted, SessionView, Settled
from x402mw.provider.journal.lock import release_lock, take_lock
from x402mw.provider.journal.opening import (
    Identity,
    file_path,
    new_identity,
    read_identity,
    read_settings,
    resume,
)
from x402mw.provider.journal.redemption import Due, Item, Refusal, Report
from x402mw.provider.journal.rows import WRITE_SETTING
from x402mw.provider.journal.schema import Durability, open_database
from x402mw.provider.journal.transaction import Transaction
from x402mw.provider.journal.writer import Operation, Result, Writer

OUTCOME_BYTES_MAX = 256 * 1024 * 1024
CHANGES_CURSOR = "changes_cursor"
VOID_RETRY_SECONDS = 1.0

log = logging.getLogger("x402mw.provider.journal")


class Journal:
    """One open book. Make it with `open`, end it with `close`; its methods may run in parallel."""

    def __init__(self, connection: sqlite3.Connection, writer: Writer, lock: int) -> None:
        self._connection = connection
        self._writer = writer
        self._lock = lock
        self.serial_at_open = writer.totals.serial
        left_open = writer.run(resume)
        self._identity: Identity = writer.run(read_identity)
        self._settings = dict(writer.run(read_settings))
        if left_open:
            log.warning("settled %d calls that a former process left open", left_open)
        writer.start()

    @classmethod
    def open(
        cls,
        path: str,
        *,
        durability: Durability = "fsync",
        clock: Callable[[], float] = time.time,
        outcome_bytes_max: int = OUTCOME_BYTES_MAX,
    ) -> "Journal":
        """Opens or creates the journal at `path`, for this process alone.

        Raises `JournalLocked` if another process has it, `JournalCorrupt` if it is damaged, and
        `ConfigurationError` for any other reason it cannot be used. Blocks: call it when starting.
        """
        path = file_path(path)
        lock = take_lock(path)
        try:
            connection = open_database(path, durability)
            try:
                writer = Writer(connection, clock, outcome_bytes_max=outcome_bytes_max)
                return cls(connection, writer, lock)
            except BaseException:
                connection.close()
                raise
        except sqlite3.Error as error:
            release_lock(lock)
            raise ConfigurationError(f"the journal {path} cannot be opened: {error}") from None
        except BaseException:
            release_lock(lock)
            raise

    def close(self) -> None:
        """Commits what waits, ends the writer and gives up the lock; may be called again."""
        if self._writer.stopped:
            return
        self._writer.stop()
        self._connection.close()
        release_lock(self._lock)

    # What is known without asking the file.

    @property
    def journal_id(self) -> bytes:
        """The 16 bytes behind `jr_...`."""
        return self._identity.journal

    @property
    def receipt_seed(self) -> bytes:
        """The seed of the key that signs this journal's receipts."""
        return self._identity.receipt_seed

    @property
    def replaced(self) -> frozenset[bytes]:
        """The ids this book has given up."""
        return self._identity.replaced

    @property
    def serial(self) -> int:
        """The number of committed batches."""
        return self._writer.totals.serial

    @property
    def unredeemed(self) -> Atomic:
        """What would be lost if the escrow never came back: charged or reserved, and not yet paid.

        Summed over all sessions that are not written off, exact as of the last commit.
        """
        return self._writer.totals.unredeemed

    def setting(self, key: str) -> str | None:
        """Returns a value that was kept with `set_setting`."""
        return self._settings.get(key)

    async def set_setting(self, key: str, value: str) -> None:
        """Keeps a value across restarts."""
        await self._write_setting(key, value)

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
        future = self._writer.submit(
            partial(
                self._admit,
                claim=claim,
                offer=offer,
                book=book,
                standing=standing,
                credentials=credentials,
            )
        )
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(self._void)
            raise

    def _admit(
        self,
        transaction: Transaction,
        *,
        claim: gate.Claim,
        offer: gate.Offer,
        book: gate.Book,
        standing: Callable[[Atomic], gate.Standing],
        credentials: bytes,
    ) -> Admitted | gate.Outcome:
        if claim.token.journal in self.replaced:
            raise gate.refused(claim, 409, "journal_replaced", "this journal was replaced")
        return calls.admit(
            transaction,
            claim,
            offer=offer,
            book=book,
            standing=standing(transaction.totals.unredeemed),
            credentials=credentials,
        )

    def _void(self, future: asyncio.Future[Admitted | gate.Outcome]) -> None:
        """Frees a call whose caller went away before it heard of its admission."""
        if future.cancelled() or future.exception() is not None:
            return
        admitted = future.result()
        if isinstance(admitted, Admitted) and not self._writer.stopped:
            void = partial(calls.settle, call=admitted, used=None, outcome=None)
            self._writer.submit(void).add_done_callback(partial(self._void_again, future))

    def _void_again(
        self, admission: asyncio.Future[Admitted | gate.Outcome], voiding: asyncio.Future[Settled]
    ) -> None:
        """Goes on trying while the journal cannot write: nothing else would free this call."""
        if voiding.exception() is not None:
            voiding.get_loop().call_later(VOID_RETRY_SECONDS, self._void, admission)

    async def start(self, call: Admitted, mark: Atomic) -> None:
        """Notes durably that the answer begins: from now on a crash charges at least `mark`."""
        await self._do(partial(calls.start, call=call, mark=mark))

    async def mark(self, call: Admitted, used: int) -> None:
        """Notes durably what a started call has used so far, so that a crash charges it too."""
        await self._do(partial(calls.mark, call=call, used=used))

    async def settle(
        self, call: Admitted, *, used: int | None, outcome: gate.Outcome | None
    ) -> Settled:
        """Charges a call for what it used, or voids it (None), and keeps its answer, all at once.

        Happens once: a repeat changes nothing and returns the first charge, with today's totals.
        It is finished even if the caller is cancelled.
        """
        return await self._do(partial(calls.settle, call=call, used=used, outcome=outcome))

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

    async def due_session(self, session: bytes, *, final: bool) -> Item | None:
        """Returns one session to redeem, durably noted as sent; None if there is nothing to send.

        A final item waits until the session is closing and no call is open.
        """
        return await self._do(partial(redemption.one, session=session, final=final))

    async def apply_verdicts(
        self, reports: Iterable[Report], refusals: Iterable[Refusal] = ()
    ) -> bool:
        """Takes over the escrow's verdicts; True if they prove this journal a restored backup."""

        def apply(transaction: Transaction) -> bool:
            redemption.apply_refusals(transaction, refusals)
            return redemption.apply_reports(transaction, reports, self.journal_id)

        return await self._do(apply)

    async def apply_changes(self, reports: Iterable[Report], cursor: int) -> bool:
        """Takes over a page of the escrow's changes; True if they prove a restored backup."""

        def apply(transaction: Transaction) -> bool:
            transaction.write(WRITE_SETTING, (CHANGES_CURSOR, str(cursor)))
            return redemption.apply_reports(transaction, reports, self.journal_id)

        restored = await self._do(apply)
        self._settings[CHANGES_CURSOR] = str(cursor)
        return restored

    @property
    def changes_cursor(self) -> int:
        """Up to where the escrow's changes have been taken over."""
        return int(self._settings.get(CHANGES_CURSOR, "0"))

    async def replace_identity(self) -> None:
        """Gives this restored book a new id and receipt key, and reads changes from the start."""

        def apply(transaction: Transaction) -> Identity:
            redemption.replace_identity(transaction, *new_identity())
            transaction.write(WRITE_SETTING, (CHANGES_CURSOR, "0"))
            return read_identity(transaction)

        self._identity = await self._do(apply)
        self._settings[CHANGES_CURSOR] = "0"

    async def _write_setting(self, key: str, value: str) -> None:
        await self._do(lambda transaction: transaction.write(WRITE_SETTING, (key, value)))
        self._settings[key] = value

    async def _do(self, operation: Operation[Result]) -> Result:
        return await self._writer.submit(operation)

"""The one thread that writes: it takes whatever operations wait and commits them together.

1. While one batch is being committed (an fsync), or another worker has its turn, the next gathers:
   the busier, the larger.
2. A caller hears of its operation only after the commit.
3. An operation that raises on purpose (`X402mwError`) has changed nothing and hurts nobody. If one
   fails otherwise the batch is taken back, and its operations run again, each by itself.
4. When the database itself fails, nothing was written and every caller gets `JournalUnavailable`.
5. Now and then it looks for workers that died, and settles what they left open.
"""

import asyncio
import concurrent.futures
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from x402mw.core.amounts import Atomic
from x402mw.core.errors import X402mwError
from x402mw.provider.journal.calls import recover
from x402mw.provider.journal.errors import JournalUnavailable
from x402mw.provider.journal.opening import check_totals, resolve, resume
from x402mw.provider.journal.redemption import replace_identity
from x402mw.provider.journal.retention import forget
from x402mw.provider.journal.rows import Totals
from x402mw.provider.journal.shared import Shared, new_identity, read_shared
from x402mw.provider.journal.store import CommitUnknown, Conflict, RowRefused, Store, StoreFailed
from x402mw.provider.journal.transaction import Needs, Transaction

BATCH_MAX = 1000
FORGET_SECONDS = 10
ROUND_SECONDS = 10.0
"""How often each worker looks for others that died, and whether one of them was the redeemer."""
DOUBT_SECONDS = 5.0
DOUBT_PAUSE_SECONDS = 0.2

log = logging.getLogger("x402mw.provider.journal")

Result = TypeVar("Result")
Operation = Callable[[Transaction], Result]


class Job(Generic[Result]):
    """An operation, what it came to, and the future of some event loop that waits for it.

    `lost` is called in that loop with a result that nobody waits for any more.
    """

    __slots__ = ("error", "future", "lost", "needs", "operation", "result")

    def __init__(
        self,
        operation: Operation[Result],
        needs: Needs | None,
        lost: Callable[[Result], object] | None,
    ) -> None:
        self.operation = operation
        self.needs = needs
        self.lost = lost
        self.future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self.result: Any = None
        self.error: Exception | None = None

    def run(self, transaction: Transaction) -> None:
        """Runs the operation; may be done again after the transaction was taken back."""
        try:
            self.result, self.error = self.operation(transaction), None
        except X402mwError as error:
            self.error = error

    def lose(self) -> None:
        """Hands back a result that nobody waits for; from whatever thread."""
        if self.lost is not None:
            with contextlib.suppress(RuntimeError):
                self.future.get_loop().call_soon_threadsafe(self.lost, self.result)

    def deliver(self) -> None:
        """Wakes the caller; runs in the caller's event loop."""
        if self.future.done():
            if self.error is None:
                self.lose()
        elif self.error is None:
            self.future.set_result(self.result)
        else:
            self.future.set_exception(self.error)


class Writer:
    """Runs operations against one store, which it opens, from `open` until `stop`.

    `totals` and `shared` are as of the last batch; `leads` tells whether this worker redeems.
    """

    def __init__(self, clock: Callable[[], float], *, outcome_bytes_max: int) -> None:
        self._clock = clock
        self._outcome_bytes_max = outcome_bytes_max
        self._jobs: queue.SimpleQueue[Job[Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread
        self._store: Store
        self._forget_at = 0.0
        self._round_at = time.monotonic() + ROUND_SECONDS
        self._doubt: tuple[str, list[Job[Any]]] | None = None
        self.stopped = False
        self.leads = False
        self.totals = Totals(0, Atomic(0), 0, 0, generation=-1)
        self.shared: Shared

    def open(self, open_store: Callable[[], Store]) -> None:
        """Starts the thread, and returns when its store is open; raises what hindered it."""
        opened: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(
            target=self._live, args=(open_store, opened), name="x402mw-journal", daemon=True
        )
        self._thread.start()
        opened.result()

    def stop(self) -> None:
        """Commits what waits, settles what is still open, and ends the thread."""
        self.stopped = True
        self._jobs.put(None)
        self._thread.join()

    def submit(
        self,
        operation: Operation[Result],
        *,
        needs: Needs | None = None,
        lost: Callable[[Result], object] | None = None,
    ) -> asyncio.Future[Result]:
        """Hands an operation to the thread; the future belongs to the running event loop.

        `needs` tells which call it is about; `lost` is called with the result if the future was
        cancelled.
        """
        if self.stopped:
            raise JournalUnavailable("the journal is closed")
        job = Job(operation, needs, lost)
        self._jobs.put(job)
        return job.future

    # The thread.

    def _live(
        self, open_store: Callable[[], Store], opened: concurrent.futures.Future[None]
    ) -> None:
        try:
            with contextlib.closing(open_store()) as self._store:
                self._resume()
                opened.set_result(None)
                self._serve()
                self._leave()
        except BaseException as error:
            if opened.done():
                log.exception("the journal's writer ended", extra={"event": "writer_ended"})
            else:
                opened.set_exception(error)

    def _resume(self) -> None:
        settled = self._run(lambda transaction: resume(transaction, self._store))
        check_totals(self._store)
        self.leads = self._store.lead()
        if settled:
            more = {"event": "calls_recovered", "count": settled}
            log.warning("settled %d calls that a former process left open", settled, extra=more)

    def _leave(self) -> None:
        try:
            self._run(lambda transaction: recover(transaction, transaction.worker))
        except (RowRefused, StoreFailed) as error:
            more = {"event": "calls_left_open"}
            log.warning("calls were left open for the next worker: %s", error, extra=more)

    def _serve(self) -> None:
        while (job := self._next()) is not None:
            jobs = [job]
            self._transact(jobs)
            for some in _by_loop(jobs):
                _deliver(some)

    def _run(self, operation: Operation[Result]) -> Result:
        """Runs one operation of our own."""
        try:
            transaction = self._begin()
            result = operation(transaction)
            self._commit(transaction)
        except Exception as error:
            raise self._store.explain(error) from error
        finally:
            self._end()
        return result

    def _next(self) -> Job[Any] | None:
        """Waits for a job, and looks after the other workers meanwhile; None is the end."""
        while True:
            rest = self._round_at - time.monotonic()
            if rest <= 0:
                self._round()
                continue
            with contextlib.suppress(queue.Empty):
                return self._jobs.get(timeout=rest)

    def _round(self) -> None:
        self._round_at = time.monotonic() + ROUND_SECONDS
        try:
            self.leads = self._store.lead()
            settled = self._run(lambda transaction: resolve(transaction, self._store))
        except Exception as error:
            more = {"event": "workers_unwatched"}
            log.warning("other workers could not be looked after: %s", error, extra=more)
        else:
            if settled:
                found = {"event": "calls_recovered", "count": settled}
                log.warning("settled %d calls that dead workers left open", settled, extra=found)

    def _gather(self, jobs: list[Job[Any]]) -> None:
        """Takes all jobs that wait by now."""
        while len(jobs) < BATCH_MAX and not self._jobs.empty():
            job = self._jobs.get()
            if job is None:
                # The end comes after these.
                self._jobs.put(None)
                return
            jobs.append(job)

    def _transact(self, jobs: list[Job[Any]], *, alone: bool = False, tries: int = 3) -> None:
        """Runs these jobs and, unless `alone`, all that wait by then: each gets its result."""
        try:
            try:
                transaction = self._begin()
            finally:
                if not alone:
                    self._gather(jobs)
            self._forget(transaction)
            transaction.fetch(job.needs for job in jobs if job.needs is not None)
            for job in jobs:
                job.run(transaction)
            self._commit(transaction)
        except Exception as raised:
            self._end()
            error = self._store.explain(raised)
            if isinstance(error, Conflict) and tries > 1:
                self._transact(jobs, alone=True, tries=tries - 1)
            else:
                self._failed(jobs, error)
        else:
            self._end()

    def _failed(self, jobs: list[Job[Any]], error: Exception) -> None:
        """Says what became of a batch that raised, or tries again what may be tried again."""
        if isinstance(error, CommitUnknown) and self._was_committed(error.ticket, jobs):
            return
        if isinstance(error, StoreFailed):
            unavailable = f"the journal cannot be written: {error}"
            for job in jobs:
                job.error = JournalUnavailable(unavailable)
        elif len(jobs) == 1:
            jobs[0].error = error
        else:
            for job in jobs:
                self._transact([job], alone=True)

    def _was_committed(self, ticket: str, jobs: list[Job[Any]]) -> bool:
        """Asks what became of a batch; while nobody can tell it is in doubt, and none follows it.

        Its callers are told that the journal is unavailable, so nothing of it is served.
        """
        until = time.monotonic() + DOUBT_SECONDS
        while True:
            try:
                return self._store.committed(ticket)
            except Exception as error:
                more = {"event": "commit_in_doubt"}
                log.warning("a commit is in doubt: %s", self._store.explain(error), extra=more)
                if time.monotonic() >= until:
                    self._doubt = ticket, jobs
                    return False
                time.sleep(DOUBT_PAUSE_SECONDS)

    def _end_doubt(self) -> None:
        """Before any other batch: what was committed after all is handed back as lost."""
        if self._doubt is None:
            return
        ticket, jobs = self._doubt
        committed = self._store.committed(ticket)
        self._doubt = None
        if committed:
            for job in jobs:
                job.lose()

    def _forget(self, transaction: Transaction) -> None:
        # Also when the clock has gone back: it may have been wrong by years.
        if not 0 < self._forget_at - transaction.now <= FORGET_SECONDS:
            more = forget(transaction)
            self._forget_at = transaction.now + (0 if more else FORGET_SECONDS)

    def _begin(self) -> Transaction:
        self._end_doubt()
        totals = Totals(*self._store.begin())
        if totals.generation != self.totals.generation:
            self.shared = read_shared(self._store, totals.generation)
        transaction = Transaction(
            self._store,
            totals,
            now=self._clock(),
            shared=self.shared,
            outcome_bytes_max=self._outcome_bytes_max,
        )
        if totals.serial < self.totals.serial:
            self._notice_loss(transaction)
        return transaction

    def _notice_loss(self, transaction: Transaction) -> None:
        """The book has gone back behind what we saw committed: it was restored under our feet."""
        more = {"event": "backup_restored"}
        log.error("this journal lost batches that were committed: it takes a new id", extra=more)
        replace_identity(transaction, *new_identity())
        transaction.shared = read_shared(self._store, transaction.totals.generation)

    def _commit(self, transaction: Transaction) -> None:
        shared, totals = transaction.shared, transaction.totals
        if transaction.finish():
            if totals.generation != shared.generation:
                shared = read_shared(self._store, totals.generation)
            self._store.commit()
        self.shared, self.totals = shared, totals

    def _end(self) -> None:
        try:
            self._store.end()
        except Exception as error:
            more = {"event": "batch_end_failed"}
            log.warning("the end of a batch failed: %s", self._store.explain(error), extra=more)
        finally:
            self._store.release()


def _by_loop(jobs: list[Job[Any]]) -> list[list[Job[Any]]]:
    loops: dict[asyncio.AbstractEventLoop, list[Job[Any]]] = {}
    for job in jobs:
        loops.setdefault(job.future.get_loop(), []).append(job)
    return list(loops.values())


def _deliver(jobs: list[Job[Any]]) -> None:
    """Wakes all callers of one event loop with one call into it."""

    def deliver() -> None:
        for job in jobs:
            job.deliver()

    loop = jobs[0].future.get_loop()
    # If the loop is closed nobody waits any more, and what was committed is in the journal.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(deliver)

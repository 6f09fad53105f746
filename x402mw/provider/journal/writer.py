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
from x402mw.provider.journal.opening import resolve
from x402mw.provider.journal.redemption import replace_identity
from x402mw.provider.journal.retention import forget
from x402mw.provider.journal.rows import Totals
from x402mw.provider.journal.shared import Shared, new_identity, read_shared
from x402mw.provider.journal.store import RowRefused, Store, StoreFailed
from x402mw.provider.journal.transaction import Needs, Transaction

BATCH_MAX = 1000
FORGET_SECONDS = 10
ROUND_SECONDS = 10.0
"""How often each worker looks for others that died, and whether one of them was the redeemer."""

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

    def deliver(self) -> None:
        """Wakes the caller; runs in the caller's event loop."""
        if self.future.done():
            if self.lost is not None and self.error is None:
                self.lost(self.result)
        elif self.error is None:
            self.future.set_result(self.result)
        else:
            self.future.set_exception(self.error)


class Writer:
    """Runs operations against one store, from `start` until `stop`.

    `totals` and `shared` are as of the last commit; `leads` tells whether this worker redeems.
    """

    def __init__(self, store: Store, clock: Callable[[], float], *, outcome_bytes_max: int) -> None:
        self._store = store
        self._clock = clock
        self._outcome_bytes_max = outcome_bytes_max
        self._jobs: queue.SimpleQueue[Job[Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="x402mw-journal", daemon=True)
        self._forget_at = 0.0
        self._round_at = time.monotonic() + ROUND_SECONDS
        self.stopped = False
        self.leads = False
        self.totals = Totals(0, Atomic(0), 0, 0, generation=-1)
        self.shared: Shared

    def start(self) -> None:
        """Starts the thread; until then `run` may be used."""
        self.leads = self._store.lead()
        self._thread.start()

    def stop(self) -> None:
        """Commits what waits, ends the thread, and settles what is still open."""
        self.stopped = True
        self._jobs.put(None)
        self._thread.join()
        try:
            self.run(lambda transaction: recover(transaction, transaction.worker))
        except (RowRefused, StoreFailed) as error:
            more = {"event": "calls_left_open"}
            log.warning("calls were left open for the next worker: %s", error, extra=more)

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

    def run(self, operation: Operation[Result]) -> Result:
        """Runs one operation in the calling thread, which must be the only one."""
        try:
            transaction = self._begin()
            result = operation(transaction)
            self._commit(transaction)
        except Exception as error:
            raise self._store.explain(error) from error
        finally:
            self._end()
        return result

    # The thread.

    def _run(self) -> None:
        while (job := self._next()) is not None:
            jobs = [job]
            self._transact(jobs)
            for some in _by_loop(jobs):
                _deliver(some)

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
            settled = self.run(lambda transaction: resolve(transaction, self._store))
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

    def _transact(self, jobs: list[Job[Any]], *, alone: bool = False) -> None:
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
        except Exception as error:
            self._end()
            self._failed(jobs, self._store.explain(error))
        else:
            self._end()

    def _failed(self, jobs: list[Job[Any]], error: Exception) -> None:
        if isinstance(error, StoreFailed):
            unavailable = f"the journal cannot be written: {error}"
            for job in jobs:
                job.error = JournalUnavailable(unavailable)
        elif len(jobs) == 1:
            jobs[0].error = error
        else:
            for job in jobs:
                self._transact([job], alone=True)

    def _forget(self, transaction: Transaction) -> None:
        # Also when the clock has gone back: it may have been wrong by years.
        if not 0 < self._forget_at - transaction.now <= FORGET_SECONDS:
            more = forget(transaction)
            self._forget_at = transaction.now + (0 if more else FORGET_SECONDS)

    def _begin(self) -> Transaction:
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

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
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable
from copy import copy
from typing import Any

from x402mw.core.amounts import Atomic
from x402mw.provider.journal.calls import recover
from x402mw.provider.journal.errors import JournalUnavailable
from x402mw.provider.journal.jobs import Job, Operation, Result, deliver
from x402mw.provider.journal.opening import check_totals, resolve, resume
from x402mw.provider.journal.redemption import replace_identity
from x402mw.provider.journal.retention import forget
from x402mw.provider.journal.rows import Totals
from x402mw.provider.journal.shared import Shared, new_identity, read_shared
from x402mw.provider.journal.store import CommitUnknown, Conflict, RowRefused, Store, StoreFailed
from x402mw.provider.journal.transaction import Known, Needs, Transaction

BATCH_MAX = 1000
FORGET_SECONDS = 10
ROUND_SECONDS = 10.0
"""How often each worker looks for others that died, and whether one of them was the redeemer."""
DOUBT_SECONDS = 5.0
DOUBT_PAUSE_SECONDS = 0.2

log = logging.getLogger("x402mw.provider.journal")


class Writer:
    """Runs operations against one store, which it opens, from `open` until `stop`.

    `totals` and `shared` are as of the last batch; `leads` tells whether this worker redeems. In a
    forked child it is `stopped`: its thread and its locks are the parent's.
    """

    def __init__(self, clock: Callable[[], float], *, outcome_bytes_max: int) -> None:
        self._clock = clock
        self._outcome_bytes_max = outcome_bytes_max
        self._jobs: queue.SimpleQueue[Job[Any] | None] = queue.SimpleQueue()
        self._gathered: dict[asyncio.AbstractEventLoop, list[Job[Any]]] = {}
        self._thread: threading.Thread
        self._store: Store
        self._forget_at = 0.0
        self._round_at = time.monotonic() + ROUND_SECONDS
        self._doubt: tuple[str, list[Job[Any]]] | None = None
        self.stopped = False
        self.leads = False
        self.totals = Totals(0, Atomic(0), 0, 0, generation=-1)
        self._shared: Shared | None = None
        self._known = Known()
        _writers.add(self)

    @property
    def shared(self) -> Shared:
        """What all workers have in common."""
        if self._shared is None:
            raise JournalUnavailable("the journal is not open yet")
        return self._shared

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
        self._hand_all_over()
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
        loop = job.future.get_loop()
        gathered = self._gathered.setdefault(loop, [])
        gathered.append(job)
        if len(gathered) == 1:
            # What one turn of the loop asks for goes together: the thread wakes once for all of it.
            loop.call_soon(self._hand_over, loop)
        return job.future

    def _hand_over(self, loop: asyncio.AbstractEventLoop) -> None:
        for job in self._gathered.pop(loop, ()):
            self._jobs.put(job)

    def _hand_all_over(self) -> None:
        for loop in [*self._gathered]:
            self._hand_over(loop)

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
            deliver(jobs)

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
        if isinstance(error, CommitUnknown):
            self._doubt = error.ticket, jobs
        if isinstance(error, StoreFailed):
            unavailable = f"the journal cannot be written: {error}"
            for job in jobs:
                job.error = JournalUnavailable(unavailable)
        elif len(jobs) == 1:
            jobs[0].error = error
        else:
            for job in jobs:
                self._transact([job], alone=True)

    def _find_out(self, unknown: CommitUnknown) -> None:
        """Returns if the batch was committed after all, and else raises.

        While nobody can tell, the batch is in doubt and none follows it. Its callers are told that
        the journal is unavailable, so nothing of it is served.
        """
        until = time.monotonic() + DOUBT_SECONDS
        while True:
            try:
                committed = self._store.committed(unknown.ticket)
            except Exception as error:
                more = {"event": "commit_in_doubt"}
                log.warning("a commit is in doubt: %s", self._store.explain(error), extra=more)
                if time.monotonic() >= until:
                    raise unknown from None
                time.sleep(DOUBT_PAUSE_SECONDS)
            else:
                if committed:
                    return
                raise StoreFailed("the connection was lost before the commit")

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
        known, gone_back = self._shared, totals.serial < self.totals.serial
        if known is None or gone_back or totals.generation != known.generation:
            self._shared = read_shared(self._store, totals.generation)
        # A batch that fails leaves nothing behind: what is known is put back by its commit.
        known_rows, self._known = self._known, Known()
        if gone_back or not self._store.undisturbed:
            known_rows = Known()
        transaction = Transaction(
            self._store,
            totals,
            now=self._clock(),
            shared=self.shared,
            known=known_rows,
            outcome_bytes_max=self._outcome_bytes_max,
        )
        if gone_back:
            self._go_back(
                transaction, noticed=known is None or known.journal != self.shared.journal
            )
        return transaction

    def _go_back(self, transaction: Transaction, *, noticed: bool) -> None:
        """The book has lost batches that we saw committed: it was restored under our feet.

        The first worker that finds it so gives it a new id; the others have `noticed` by that.
        """
        if noticed:
            self.totals = copy(transaction.totals)
            return
        more = {"event": "backup_restored"}
        log.error("this journal lost batches that were committed: it takes a new id", extra=more)
        replace_identity(transaction, *new_identity())

    def _commit(self, transaction: Transaction) -> None:
        if transaction.finish():
            try:
                self._store.commit()
            except CommitUnknown as unknown:
                self._find_out(unknown)
        self._shared, self.totals = transaction.shared, transaction.totals
        self._known = transaction.known

    def _end(self) -> None:
        try:
            self._store.end()
        except Exception as error:
            more = {"event": "batch_end_failed"}
            log.warning("the end of a batch failed: %s", self._store.explain(error), extra=more)
        finally:
            self._store.release()


_writers: weakref.WeakSet[Writer] = weakref.WeakSet()


def _stop_inherited() -> None:
    for writer in list(_writers):
        writer.stopped = True


os.register_at_fork(after_in_child=_stop_inherited)

"""The one thread that writes: it takes whatever operations wait and commits them together.

1. While one batch is being committed (an fsync), the next gathers: the busier, the larger.
2. A caller hears of its operation only after the commit.
3. An operation that raises on purpose (`X402mwError`) has changed nothing and hurts nobody. If one
   fails otherwise the batch is taken back, and its operations run again, each by itself.
4. When the database itself fails, nothing was written and every caller gets `JournalUnavailable`.
"""

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from x402mw.core.errors import X402mwError
from x402mw.provider.journal.errors import JournalUnavailable
from x402mw.provider.journal.retention import forget
from x402mw.provider.journal.rows import Totals
from x402mw.provider.journal.transaction import Transaction

BATCH_MAX = 1000
FORGET_SECONDS = 10

Result = TypeVar("Result")
Operation = Callable[[Transaction], Result]


@dataclass(frozen=True, slots=True)
class Job(Generic[Result]):
    """An operation and the future, of some event loop, that waits for it."""

    operation: Operation[Result]
    future: asyncio.Future[Result]


@dataclass(frozen=True, slots=True)
class Done:
    """A job's end: a result, or what it raised."""

    job: Job[Any]
    result: Any = None
    error: Exception | None = None

    def deliver(self) -> None:
        """Wakes the caller; runs in the caller's event loop."""
        if self.job.future.done():
            return
        if self.error is None:
            self.job.future.set_result(self.result)
        else:
            self.job.future.set_exception(self.error)


class Writer:
    """Runs operations against one connection, from `start` until `stop`."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        clock: Callable[[], float],
        *,
        outcome_bytes_max: int,
    ) -> None:
        self._connection = connection
        self._clock = clock
        self._outcome_bytes_max = outcome_bytes_max
        self._jobs: queue.SimpleQueue[Job[Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="x402mw-journal", daemon=True)
        self.stopped = False
        self._forget_at = 0.0
        self.totals: Totals = self.run(lambda transaction: transaction.totals)

    def start(self) -> None:
        """Starts the thread; until then `run` may be used."""
        self._thread.start()

    def stop(self) -> None:
        """Commits what waits, and ends the thread."""
        self.stopped = True
        self._jobs.put(None)
        self._thread.join()

    def submit(self, operation: Operation[Result]) -> asyncio.Future[Result]:
        """Hands an operation to the thread; the future belongs to the running event loop."""
        if self.stopped:
            raise JournalUnavailable("the journal is closed")
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._jobs.put(Job(operation, future))
        return future

    def run(self, operation: Operation[Result]) -> Result:
        """Runs one operation in the calling thread, before `start`."""
        try:
            transaction = self._begin()
            result = operation(transaction)
            self._commit(transaction)
        finally:
            self._rollback()
        return result

    # The thread.

    def _run(self) -> None:
        while jobs := self._take():
            for done in _by_loop(self._transact(jobs)):
                _deliver(done)

    def _take(self) -> list[Job[Any]]:
        """Waits for a job and takes all that are there; none means that there will be no more."""
        jobs: list[Job[Any]] = []
        job = self._jobs.get()
        while job is not None:
            jobs.append(job)
            if len(jobs) == BATCH_MAX or self._jobs.empty():
                return jobs
            job = self._jobs.get()
        if jobs:
            self._jobs.put(None)
        return jobs

    def _transact(self, jobs: list[Job[Any]]) -> list[Done]:
        try:
            return self._try(jobs)
        except (sqlite3.IntegrityError, sqlite3.DataError) as error:
            return self._again(jobs, error)
        except sqlite3.DatabaseError as error:
            problem = f"the journal cannot be written: {error}"
            return [Done(job, error=JournalUnavailable(problem)) for job in jobs]
        except Exception as error:
            return self._again(jobs, error)

    def _again(self, jobs: list[Job[Any]], error: Exception) -> list[Done]:
        if len(jobs) == 1:
            return [Done(jobs[0], error=error)]
        return [done for job in jobs for done in self._transact([job])]

    def _try(self, jobs: list[Job[Any]]) -> list[Done]:
        try:
            transaction = self._begin()
            self._forget(transaction)
            done = [_attempt(job, transaction) for job in jobs]
            self._commit(transaction)
        finally:
            self._rollback()
        return done

    def _forget(self, transaction: Transaction) -> None:
        # Also when the clock has gone back: it may have been wrong by years.
        if not 0 < self._forget_at - transaction.now <= FORGET_SECONDS:
            more = forget(transaction)
            self._forget_at = transaction.now + (0 if more else FORGET_SECONDS)

    def _begin(self) -> Transaction:
        self._connection.execute("BEGIN IMMEDIATE")
        return Transaction(self._connection, self._clock(), self._outcome_bytes_max)

    def _commit(self, transaction: Transaction) -> None:
        if transaction.finish():
            self._connection.execute("COMMIT")
            self.totals = transaction.totals

    def _rollback(self) -> None:
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")


def _attempt(job: Job[Any], transaction: Transaction) -> Done:
    try:
        return Done(job, job.operation(transaction))
    except X402mwError as error:
        return Done(job, error=error)


def _by_loop(done: list[Done]) -> list[list[Done]]:
    loops: dict[asyncio.AbstractEventLoop, list[Done]] = {}
    for one in done:
        loops.setdefault(one.job.future.get_loop(), []).append(one)
    return list(loops.values())


def _deliver(done: list[Done]) -> None:
    """Wakes all callers of one event loop with one call into it."""

    def deliver() -> None:
        for one in done:
            one.deliver()

    loop = done[0].job.future.get_loop()
    try:
        loop.call_soon_threadsafe(deliver)
    except RuntimeError:
        # The loop is closed: nobody waits any more, and what was committed is in the journal.
        return

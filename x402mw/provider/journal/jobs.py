"""Operations on their way through the writer's thread, and back to whoever waits for them."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from x402mw.core.errors import X402mwError
from x402mw.provider.journal.transaction import Needs, Transaction

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


def deliver(jobs: list[Job[Any]]) -> None:
    """Wakes the callers of all jobs, with one call into each event loop."""
    loops: dict[asyncio.AbstractEventLoop, list[Job[Any]]] = {}
    for job in jobs:
        loops.setdefault(job.future.get_loop(), []).append(job)
    for loop, some in loops.items():
        # If the loop is closed nobody waits any more, and what was committed is in the journal.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_deliver, some)


def _deliver(jobs: list[Job[Any]]) -> None:
    for job in jobs:
        job.deliver()

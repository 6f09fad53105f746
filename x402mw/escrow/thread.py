"""Whole transactions on SQLite in one thread, where each statement alone would be three waits.

What writes or reads awaits nothing but its connection. Given one that never waits, it runs to its
end in whatever thread drives it, so that one transaction costs the event loop one hop.
"""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

Result = TypeVar("Result")
Work = Callable[[AsyncConnection], Coroutine[Any, Any, Result]]


class Direct(AsyncConnection):
    """A connection that answers at once; it blocks, so only a thread of its own may use it."""

    __slots__ = ()

    async def execute(self, *given: Any, **named: Any) -> Any:
        """Runs a statement."""
        return self._proxied.execute(*given, **named)

    async def exec_driver_sql(self, *given: Any, **named: Any) -> Any:
        """Runs a statement of the driver's own."""
        return self._proxied.exec_driver_sql(*given, **named)


class Threads:
    """Threads that run transactions, one each at a time, on connections that are kept."""

    def __init__(self, engine: AsyncEngine, blocking: Engine, count: int) -> None:
        """`blocking` keeps as many connections as there are threads, so that none waits for one."""
        self._engine = engine
        self._blocking = blocking
        self._threads = ThreadPoolExecutor(count, "x402mw-escrow")

    async def transact(self, work: Work[Result]) -> Result:
        """Begins, does the work, and commits or rolls back."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._transact, work)

    def _transact(self, work: Work[Result]) -> Result:
        with self._blocking.begin() as connection:
            return run_to_end(work(Direct(self._engine, connection)))

    async def close(self) -> None:
        """Ends what runs, and lets go of the file."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._threads.shutdown()
        self._blocking.dispose()


def run_to_end(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Runs a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: Result = done.value
        return result
    coroutine.close()
    raise RuntimeError("an operation of the ledger waits for its connection only")

"""Waiting for others, in event loops and plain threads alike.

A `Signal` wakes everyone who waits for something to change; `Sections` let one caller at a time do
what all of them need (open a session, renew a token), and hand its failure to those who waited.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from x402mw_client.memory import Memory

ENTERED: Final = object()
"""What `Sections.enter` returns to the one who is now inside."""


class Signal:
    """Something changed. Waiters check their condition after each notice, and before the first.

    With `poll_seconds` they also check it that often: what another process changed nobody notices.
    """

    def __init__(self, poll_seconds: float | None = None) -> None:
        self._poll = poll_seconds
        self._waiters: set[Callable[[], object]] = set()
        self._lock = threading.Lock()

    def notify(self) -> None:
        """Wakes all waiters, of whatever loop or thread."""
        if not self._waiters:
            # Who begins to wait just now has not looked at its condition yet.
            return
        with self._lock:
            waiters = tuple(self._waiters)
        for wake in waiters:
            wake()

    @contextmanager
    def _waking(self, wake: Callable[[], object]) -> Iterator[None]:
        with self._lock:
            self._waiters.add(wake)
        try:
            yield
        finally:
            with self._lock:
                self._waiters.discard(wake)

    async def wait_async(self, condition: Callable[[], Any], seconds: float) -> Any:
        """Returns what `condition` returns once that is something, or None after `seconds`."""
        if found := condition():
            return found
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()

        def wake() -> None:
            # The loop of a waiter that is gone may be closed, at any moment.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(changed.set)

        try:
            with self._waking(wake):
                async with asyncio.timeout(seconds):
                    while not (found := condition()):
                        with suppress(TimeoutError):
                            async with asyncio.timeout(self._poll):
                                await changed.wait()
                        changed.clear()
        except TimeoutError:
            return None
        return found

    def wait(self, condition: Callable[[], Any], seconds: float) -> Any:
        """The same for plain threads."""
        changed, deadline = threading.Event(), time.monotonic() + seconds
        with self._waking(changed.set):
            while not (found := condition()):
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                changed.wait(left if self._poll is None else min(left, self._poll))
                changed.clear()
        return found


class Sections:
    """Single-flight sections by name, among all processes that share the wallet's memory."""

    def __init__(self, signal: Signal, memory: Memory) -> None:
        self._signal, self._memory = signal, memory
        self._lock = threading.Lock()
        self._inside: set[object] = set()
        self._failures: dict[object, tuple[int, Exception]] = {}
        self._ended = 0

    def ticket(self) -> int:
        """Take one before waiting: only failures after it concern the one who waits."""
        return self._ended

    def enter(self, name: object, ticket: int) -> Any:
        """Returns `ENTERED`, or None while another is inside; raises the other's failure."""
        with self._lock:
            if name in self._inside:
                return None
            ended, failure = self._failures.get(name, (0, None))
            if failure is not None and ended > ticket:
                raise failure
            if not self._memory.enter(name):
                return None
            self._inside.add(name)
            return ENTERED

    @contextmanager
    def leaving(self, name: object) -> Iterator[None]:
        """Leaves the section at the end, whatever that is."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
            raise
        finally:
            self._leave(name, failure)

    def _leave(self, name: object, failure: Exception | None) -> None:
        with self._lock:
            self._inside.discard(name)
            self._memory.exit(name)
            self._ended += 1
            self._failures.pop(name, None)
            if failure is not None:
                self._failures[name] = (self._ended, failure)
        self._signal.notify()

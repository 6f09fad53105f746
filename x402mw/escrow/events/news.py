"""Wakes those in this process who wait for a commit; other processes' commits are polled for."""

import asyncio
import contextlib
from collections.abc import Iterator

POLL_SECONDS = 1.0


class Ear:
    """One who waits."""

    def __init__(self) -> None:
        self._heard = asyncio.Event()

    def wake(self) -> None:
        """Ends the wait, or the next one."""
        self._heard.set()

    async def wait(self, seconds: float = POLL_SECONDS) -> None:
        """Waits until something was committed here, or so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._heard.wait()
        self._heard.clear()


class News:
    """Tells every ear that something was committed."""

    def __init__(self) -> None:
        self._ears: set[Ear] = set()

    def tell(self) -> None:
        """Wakes all who wait."""
        for ear in self._ears:
            ear.wake()

    @contextlib.contextmanager
    def listen(self) -> Iterator[Ear]:
        """An ear, for as long as the block lasts."""
        ear = Ear()
        self._ears.add(ear)
        try:
            yield ear
        finally:
            self._ears.discard(ear)

"""Stories that nobody waits for, told beside the calls."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from x402mw_client.drive import AsyncDriver, SyncDriver
from x402mw_client.steps import Story


class AsyncAside:
    """Tells stories in tasks of the running loop."""

    def __init__(self, driver: AsyncDriver) -> None:
        self._driver = driver
        self._tasks: set[asyncio.Task[None]] = set()

    def tell(self, story: Story[None]) -> None:
        """Begins a story and returns at once."""
        task = asyncio.create_task(self._driver.run(story))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def aclose(self) -> None:
        """Waits for the stories that have begun; each takes a bounded time."""
        await asyncio.gather(*self._tasks, return_exceptions=True)


class SyncAside:
    """Tells stories in one thread of its own."""

    def __init__(self, driver: SyncDriver) -> None:
        self._driver = driver
        self._thread: ThreadPoolExecutor | None = None

    def tell(self, story: Story[None]) -> None:
        """Begins a story, after those before it, and returns at once."""
        self._thread = self._thread or ThreadPoolExecutor(1, "x402mw-receipts")
        self._thread.submit(self._driver.run, story)

    def close(self) -> None:
        """Waits for the stories that have begun; each takes a bounded time."""
        if self._thread is not None:
            self._thread.shutdown()

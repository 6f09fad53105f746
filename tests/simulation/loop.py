"""An event loop whose time is made up, and processes that can die in the middle of anything.

Nothing waits: when nobody can go on, time jumps to the next timer. A killed process simply never
runs again: no `finally`, no `except`, as after `kill -9`.
"""

import asyncio
import heapq
import sys
import traceback
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import ContextVar, copy_context
from typing import Any

HERE: ContextVar["Process | None"] = ContextVar("HERE", default=None)
"""The process whose code is running now; None is the world itself, which never dies."""

TIMERS = 60
HANDLES_MAX = 3_000_000
"""A seed that runs longer than this is stuck in a loop."""


class Killed(BaseException):
    """Ends the code of a process that has just died, up to where it next would wait."""


class Stuck(Exception):
    """The simulated world cannot go on."""


class SimLoop(asyncio.BaseEventLoop):
    """asyncio without sockets, threads or waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.moment = 0.0
        self.handles = 0
        self.graveyard: list[asyncio.Task[Any]] = []
        self.errors: list[str] = []
        self.set_exception_handler(lambda _loop, _context: None)

    def time(self) -> float:
        """Seconds since the world began."""
        return self.moment

    def call_soon(  # type: ignore[override]  # the types of its arguments do not matter
        self, callback: Any, *args: Any, context: Any = None
    ) -> Any:
        """Without the checks of the original: this is a tenth of all that happens."""
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)  # type: ignore[attr-defined]  # of BaseEventLoop
        return handle

    def call_soon_threadsafe(  # type: ignore[override]  # likewise
        self, callback: Any, *args: Any, context: Any = None
    ) -> Any:
        """There is one thread."""
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(  # type: ignore[override]  # likewise
        self, _executor: Any, func: Any, *args: Any
    ) -> Any:
        """What would go to a thread is done at once."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def _write_to_self(self) -> None:
        """Nobody has to be woken."""

    def _process_events(self, event_list: Any) -> None:
        """There are none."""

    def _run_once(self) -> None:
        ready: Any = self._ready  # type: ignore[attr-defined]  # of BaseEventLoop
        if not ready:
            self._jump(ready)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            process = handle._context.get(HERE)
            if process is None or process.alive:
                handle._run()
                self.handles += 1
        if self.handles > HANDLES_MAX:
            raise Stuck("too much happens: something goes round in circles")

    def _jump(self, ready: Any) -> None:
        """Lets time pass to the next timer."""
        scheduled: Any = self._scheduled  # type: ignore[attr-defined]  # of BaseEventLoop
        if self._timer_cancelled_count * 2 > len(scheduled) > TIMERS:  # type: ignore[has-type]
            # Most timers are limits that were never reached.
            scheduled[:] = [handle for handle in scheduled if not handle._cancelled]
            heapq.heapify(scheduled)
            self._timer_cancelled_count = 0
        while scheduled:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False
            if handle._cancelled:
                self._timer_cancelled_count -= 1
            else:
                self.moment = max(self.moment, handle._when)
                ready.append(handle)
                return
        raise Stuck("nothing is left to happen")

    def end(self) -> None:
        """Ends what still waits, the dead included, without letting any of it be heard."""
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        try:
            for task in [*self.graveyard, *asyncio.all_tasks(self)]:
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                coroutine: Any = task.get_coro()
                for _ in range(20):
                    try:
                        coroutine.close()
                    except (RuntimeError, ValueError):
                        continue
                    except BaseException:
                        pass
                    break
            self.graveyard.clear()
            self.close()
        finally:
            sys.unraisablehook = hook


class Process:
    """One simulated process: what it spawns dies with it, between two steps of the loop."""

    def __init__(self, loop: SimLoop, name: str) -> None:
        self.loop, self.name, self.alive = loop, name, True
        self._context = copy_context()
        self._context.run(HERE.set, self)
        self._tasks: set[asyncio.Task[Any]] = set()
        self.at_death: list[Callable[[], None]] = []

    def spawn(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Starts a task in this process."""
        task = self.loop.create_task(work, context=self._context.copy())
        self.loop.graveyard.append(task)
        task.add_done_callback(self._note_error)
        return task

    def _note_error(self, task: "asyncio.Task[Any]") -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and self.alive and not isinstance(error, (Killed, OSError)):
            where = "".join(traceback.format_exception(error)[-4:])
            self.loop.errors.append(f"{self.name}: {where}")

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls a function as code of this process."""
        return self._context.copy().run(function, *args)

    def kill(self) -> None:
        """The process is gone."""
        if self.alive:
            self.alive = False
            for tell in self.at_death:
                with suppress(Exception):
                    tell()


def check_alive() -> None:
    """Ends the running code if its process has died in this very step."""
    process = HERE.get()
    if process is not None and not process.alive:
        raise Killed

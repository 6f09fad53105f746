"""Processes forked from this one, and one loop that waits for all of them at once.

Forking costs a millisecond where a fresh interpreter costs a second. It is sound only in a process
that has imported everything and has no threads, event loops or database connections.
"""

import contextlib
import ctypes
import gc
import heapq
import importlib
import itertools
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

TICK_SECONDS = 0.02
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class Late(Exception):
    """What was waited for did not happen in time."""


@dataclass(eq=False)
class Child:
    """One forked process.

    `said` is what it wrote to its pipe, `status` its end as in `Popen`, `seconds` the processor's
    time that it took.
    """

    name: str
    pid: int
    pidfd: int
    pipe: int
    said: bytes = b""
    status: int | None = None
    seconds: float = 0.0

    @property
    def alive(self) -> bool:
        return self.status is None

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, if there is still somebody to get it."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    def reap(self) -> None:
        """Takes over the end of a process that has ended."""
        _, status, used = os.wait4(self.pid, 0)
        self.seconds = used.ru_utime + used.ru_stime
        self.status = os.waitstatus_to_exitcode(status)
        self.hear()
        os.close(self.pidfd)
        os.close(self.pipe)

    def hear(self) -> None:
        """Takes over what it has said."""
        with contextlib.suppress(BlockingIOError):
            while new := os.read(self.pipe, 65_536):
                self.said += new


@dataclass
class Family:
    """The living children of this process, and the timers of its one loop."""

    children: list[Child] = field(default_factory=list)
    on_end: Callable[[Child], None] = lambda child: None
    on_tick: Callable[[], None] = lambda: None
    _timers: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    def fork(self, name: str, log: Path, work: Callable[[int], None]) -> Child:
        """Runs `work` in a forked process; it is given the pipe to talk to us."""
        reading, writing = os.pipe()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _live(parent, log, lambda: work(writing))
        os.close(writing)
        os.set_blocking(reading, False)
        child = Child(name, pid, os.pidfd_open(pid), reading)
        self.children.append(child)
        return child

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        """Has something done later, while we wait for anything."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), act))

    def forget_timers(self) -> None:
        """Drops what was to be done later."""
        self._timers.clear()

    def wait(self, until: Callable[[], bool], seconds: float, what: str) -> None:
        """Waits until a condition holds, doing what is due meanwhile; raises `Late`."""
        deadline = time.monotonic() + seconds
        while not until():
            if time.monotonic() > deadline:
                raise Late(f"{what} took more than {seconds:g} s")
            self.turn()

    def turn(self) -> None:
        """One round of the loop: timers, then whoever has ended or said something, or a tick."""
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()
        poll = select.poll()
        for child in self.children:
            poll.register(child.pidfd, select.POLLIN)
            poll.register(child.pipe, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(TICK_SECONDS * 1000)}
        for child in list(self.children):
            if child.pidfd in ready:
                self.children.remove(child)
                child.reap()
                self.on_end(child)
            elif child.pipe in ready:
                child.hear()
        self.on_tick()

    def kill_all(self) -> None:
        """Ends every child now."""
        for child in self.children:
            child.send(signal.SIGKILL)
        for child in self.children:
            child.reap()
        self.children.clear()


def learn(folder: Path) -> None:
    """Imports what children that ended well had to import, so that the next find it there."""
    for path in folder.rglob("*.modules"):
        for name in sorted(path.read_text().split()):
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def freeze() -> None:
    """Prepares for many forks: what is there now is never collected, so its pages stay shared."""
    gc.collect()
    gc.freeze()


def _live(parent: int, log: Path, work: Callable[[], None]) -> None:
    """The whole life of a child; it never returns."""
    status = 1
    try:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        known = set(sys.modules)
        work()
        log.with_suffix(".modules").write_text("\n".join(sys.modules.keys() - known))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
            sys.stdout.flush()
        os._exit(status)

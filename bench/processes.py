"""Starts the other processes of the bench and ends them."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

READY_SECONDS = 60
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Process:
    """A process that listens on a port."""

    name: str
    port: int
    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def cpu_seconds(self) -> float:
        """The CPU it and its children have used so far; 0 where that cannot be read."""
        numbers = [self.popen.pid, *_children(self.popen.pid)]
        return sum(_cpu_ticks(number) for number in numbers) / _TICKS


def _children(pid: int) -> list[int]:
    try:
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _cpu_ticks(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


def free_port() -> int:
    """A port nobody listens on right now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def running(
    name: str, folder: Path, *arguments: str, port: int, settings: Mapping[str, str] | None = None
) -> Iterator[Process]:
    """Runs `python -m ...` until the block ends; it listens on `port` when the block begins."""
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        popen = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **(settings or {})},
        )
    process = Process(name, port, popen, log)
    try:
        _wait(process)
        yield process
    finally:
        popen.terminate()
        try:
            popen.wait(timeout=15)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()


def _wait(process: Process) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.popen.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", process.port), 1):
            return
        time.sleep(0.05)
    raise RuntimeError(f"{process.name} did not start:\n{process.log.read_text()[-2000:]}")

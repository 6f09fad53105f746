"""The load generator: one thread, one epoll, whole requests that were made before the clock starts.

Every request may differ from the last. In a closed loop each connection sends its next request as
soon as it has its answer; with a `rate` requests leave at their time, whoever is late. It counts
how much of its own core it used: near 1.0 it, and not the server, was what was measured.
"""

import gc
import os
import select
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

ANSWER_BYTES = 65_536
SILENCE_SECONDS = 30
_LENGTH = b"content-length: "


@dataclass
class Load:
    """What one run of requests came to. Times are in seconds."""

    seconds: float = 0.0
    busy: float = 0.0
    latencies: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)

    @property
    def rate(self) -> float:
        """Answers per second."""
        return len(self.latencies) / self.seconds

    def percentile(self, share: float) -> float:
        """The latency that this share of the answers did not exceed, in milliseconds."""
        ordered = sorted(self.latencies)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class _Line:
    """One connection, and the answer it is waiting for."""

    __slots__ = ("began", "got", "socket")

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=SILENCE_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.began = 0.0
        self.got = b""

    def send(self, request: bytes) -> None:
        self.began = time.perf_counter()
        if self.socket.send(request) != len(request):
            raise RuntimeError("the server reads too slowly for whole requests")

    def receive(self) -> bytes | None:
        """The whole answer, or None while some of it is missing."""
        part = self.socket.recv(ANSWER_BYTES)
        if not part:
            raise RuntimeError(f"the server hung up after {self.got!r}")
        answer = self.got + part if self.got else part
        if _whole(answer):
            self.got = b""
            return answer
        self.got = answer
        return None


def _whole(answer: bytes) -> bool:
    head = answer.find(b"\r\n\r\n")
    if head < 0:
        return False
    start = answer.find(_LENGTH, 0, head)
    if start < 0:
        return answer.endswith(b"0\r\n\r\n")
    end = answer.index(b"\r", start)
    return len(answer) - head - 4 >= int(answer[start + len(_LENGTH) : end])


def drive(port: int, requests: Sequence[bytes], *, connections: int = 16, rate: float = 0) -> Load:
    """Sends every request once, in order, and returns when the last answer is here.

    `rate` is in requests per second; 0 is a closed loop.
    """
    lines = {line.socket.fileno(): line for line in (_Line(port) for _ in range(connections))}
    poll = select.epoll()
    for number in lines:
        poll.register(number, select.EPOLLIN)
    gc.disable()
    try:
        return _drive(list(lines.values()), lines, poll, requests, rate)
    finally:
        gc.enable()
        poll.close()
        for line in lines.values():
            line.socket.close()


def _drive(
    idle: list[_Line],
    lines: dict[int, _Line],
    poll: select.epoll,
    requests: Sequence[bytes],
    rate: float,
) -> Load:
    load = Load()
    clock, latencies, statuses = time.perf_counter, load.latencies, load.statuses
    sent, count = 0, len(requests)
    busy, start = time.process_time(), clock()
    while len(latencies) < count:
        due = min(count, int((clock() - start) * rate) + 1) if rate else count
        while idle and sent < due:
            idle.pop().send(requests[sent])
            sent += 1
        events = poll.poll(_wait(rate, sent, count, start))
        if not events and not (rate and sent < count):
            raise RuntimeError("the server does not answer any more")
        for number, _ in events:
            line = lines[number]
            answer = line.receive()
            if answer is None:
                continue
            latencies.append(clock() - line.began)
            statuses[answer[9:12].decode()] += 1
            if rate:
                idle.append(line)
            elif sent >= count:
                # Nobody listens any more: a server may hang up on lines that are idle for long.
                poll.unregister(number)
            else:
                line.send(requests[sent])
                sent += 1
    load.seconds, load.busy = clock() - start, time.process_time() - busy
    return load


def _wait(rate: float, sent: int, count: int, start: float) -> float:
    """How long to wait for answers: in a paced run, until the next request is due."""
    if not rate or sent >= count:
        return SILENCE_SECONDS
    return max(0.0005, start + sent / rate - time.perf_counter())


def pin(core: int) -> None:
    """Keeps this process on one core, where there are several."""
    if hasattr(os, "sched_setaffinity") and (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(0, {core})

"""How long a worker waits for its turn to write, and what a shared journal serves.

    python -m bench.journal                     a file, 1, 2 and 4 workers
    python -m bench.journal postgresql 1 2      a PostgreSQL server of our own, which does fsync

Each worker is a process with 16 calls at a time, each admitted and settled durably. The wait is a
batch's: from asking for the turn until it has it.
"""

import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.provider.journal_worker import workers
from tests.support.postgresql import start_server

SECONDS = 5.0
LANES = 16
ROUND_SECONDS = 10.0


@contextmanager
def new_places(kind: str) -> Iterator[Iterator[str]]:
    """Places for journals that nobody has used."""
    if kind == "postgresql":
        server = start_server(durable=True)
        try:
            yield (server.new_database() for _ in range(100))
        finally:
            server.remove()
    else:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            yield (str(Path(folder) / f"{number}.db") for number in range(100))


def measure(place: str, count: int, seconds: float = SECONDS) -> tuple[float, list[float]]:
    """Calls per second of so many workers together, and their batches' waits in milliseconds."""
    with workers(place, *[ROUND_SECONDS] * count, durability="fsync") as crowd:
        for worker in crowd:
            worker.tell("load", seconds, LANES)
        loads = [worker.hear() for worker in crowd]
    waits = sorted(1000 * wait for _, found in loads for wait in found)
    return sum(calls for calls, _ in loads) / seconds, waits


def main() -> None:
    """Prints one line for each number of workers."""
    kind, *counts = sys.argv[1:] or ["file"]
    with new_places(kind) as places:
        for count in map(int, counts or ("1", "2", "4")):
            rate, waits = measure(next(places), count)
            print(
                f"{kind}, {count} workers: {rate:.0f} calls/s; a batch waits"
                f" p50 {statistics.median(waits):.2f} ms,"
                f" p99 {waits[len(waits) * 99 // 100]:.1f} ms, worst {waits[-1]:.1f} ms"
            )


if __name__ == "__main__":
    main()

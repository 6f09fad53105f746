"""Interleaved rounds over HTTP: A B C A B C ..., so that a noisy minute hits all alike.

A ratio is taken inside a round, against the bare app of that same round; what is reported is the
median over rounds.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from bench import load
from bench.processes import Process

BARE = "bare"
REQUESTS_MIN = 64
Requests = Callable[[int], list[bytes]]


@dataclass
class Cell:
    """One line of a table: requests of one kind to one server.

    `base` names the cell it is compared with.
    """

    name: str
    server: Process
    requests: Requests
    status: str = "200"
    base: str = BARE
    connections: int = 16
    rate: float = 1000.0
    samples: list[dict[str, float]] = field(default_factory=list)

    def run(self, seconds: float) -> dict[str, float]:
        """Drives the server for about so long, and notes what came of it."""
        count = max(REQUESTS_MIN, int(self.rate * seconds))
        requests = self.requests(count)
        cpu = self.server.cpu_seconds
        run = load.drive(self.server.port, requests, connections=self.connections)
        cpu = self.server.cpu_seconds - cpu
        wrong = count - run.statuses[self.status]
        if wrong > count // 1000:
            raise RuntimeError(f"{self.name}: {wrong} of {count} answers: {dict(run.statuses)}")
        self.rate = run.rate
        return {
            "rate": run.rate,
            "cpu_us": 1e6 * cpu / count,
            "p50_ms": run.percentile(0.50),
            "p99_ms": run.percentile(0.99),
            "generator": run.busy / run.seconds,
        }


def play(
    cells: list[Cell], *, rounds: int, seconds: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Runs all cells in turn, so many times; the first, unnoted round warms everything up."""
    for cell in cells:
        cell.run(min(seconds, 0.5))
    for number in range(rounds):
        began = time.monotonic()
        found = {cell.name: cell.run(seconds) for cell in cells}
        for cell in cells:
            cell.samples.append(_beside(found[cell.name], found[cell.base]))
        took = time.monotonic() - began
        say(f"  round {number + 1} of {rounds}: {took:.0f} s, {_brief(cells)}")
    return {cell.name: summary(cell.samples) for cell in cells}


def _beside(sample: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    """A sample with its ratios to the base of its round, by rate and by CPU a request."""
    return {
        **sample,
        "ratio": sample["rate"] / base["rate"],
        "cpu_ratio": base["cpu_us"] / sample["cpu_us"] if sample["cpu_us"] else 0.0,
    }


def _brief(cells: Iterable[Cell]) -> str:
    return ", ".join(f"{cell.name} {cell.samples[-1]['rate']:.0f}/s" for cell in list(cells)[:4])


def summary(samples: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over the rounds, and how far the ratios lie apart."""
    medians = {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}
    ratios = sorted(sample["ratio"] for sample in samples)
    return {**medians, "ratio_low": ratios[0], "ratio_high": ratios[-1], "samples": samples}


def between(cells: dict[str, Any], ours: str, theirs: str) -> float:
    """The median over rounds of the ratio of two cells' rates."""
    pairs = zip(cells[ours]["samples"], cells[theirs]["samples"], strict=True)
    return statistics.median(one["rate"] / other["rate"] for one, other in pairs)

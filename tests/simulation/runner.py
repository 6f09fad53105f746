"""Runs seeds: one with its trace, or very many in several processes with a bar and a summary."""

import gc
import logging
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tests.simulation.mutations import MUTATIONS
from tests.simulation.world import Report, simulate

SEEDS_BETWEEN_COLLECTIONS = 8
SEEDS_BETWEEN_LINES = 250
Job = tuple[int, int, str | None]


@contextmanager
def quietly() -> Iterator[None]:
    """Garbage of dead processes is collected between seeds, and complains to nobody."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
            gc.collect()
    finally:
        gc.enable()
        sys.unraisablehook = hook


def run_seed(job: Job, *, trace: bool = False) -> Report:
    """Runs one seed."""
    seed, operations, mutation = job
    with quietly_at(seed), MUTATIONS[mutation]() if mutation else nullcontext():
        return simulate(seed, operations=operations, trace=trace)


@contextmanager
def quietly_at(seed: int) -> Iterator[None]:
    """The same, collecting only now and then: going through the whole heap takes its time."""
    if seed % SEEDS_BETWEEN_COLLECTIONS == 0:
        gc.collect()
    yield


def _begin_worker() -> None:
    sys.unraisablehook = lambda _: None
    warnings.simplefilter("ignore")
    # What a killed process held is garbage here, of which its pool would tell line after line.
    logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)
    gc.disable()
    gc.freeze()


def run_many(seeds: Iterable[int], operations: int, processes: int, mutation: str | None) -> int:
    """Runs many seeds and prints a summary; 1 if any of them broke a rule."""
    jobs: list[Job] = [(seed, operations, mutation) for seed in seeds]
    console, failed, began = Console(), list[Report](), time.monotonic()
    totals: Counter[str] = Counter()
    done = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    context = multiprocessing.get_context("spawn")
    with (
        Progress(*columns, TimeRemainingColumn(), console=console) as progress,
        context.Pool(processes, _begin_worker) as pool,
    ):
        bar = progress.add_task("seeds", total=len(jobs))
        for report in pool.imap_unordered(run_seed, jobs, chunksize=4):
            _add(totals, report)
            if report.problems:
                failed.append(report)
                progress.print(f"[red]seed {report.seed}[/]: {report.problems[0][:200]}")
            progress.update(bar, advance=1, description=f"seeds, {len(failed)} failed")
            done += 1
            if not console.is_terminal and done % SEEDS_BETWEEN_LINES == 0:
                _say(f"{done} seeds, {len(failed)} failed, {time.monotonic() - began:.0f} s")
    _summarise(console, totals, failed, len(jobs), time.monotonic() - began)
    return 1 if failed else 0


def _add(totals: Counter[str], report: Report) -> None:
    totals.update(report.counts)
    totals["OPERATIONS"] += report.operations
    totals["RUNS"] += report.runs
    totals["SECONDS"] += int(report.seconds)
    totals["SMALLEST"] = min(totals["SMALLEST"] or 10**9, report.operations)
    totals.update({f"seeds with {name}": 1 for name in report.counts})


def _summarise(
    console: Console, totals: Counter[str], failed: list[Report], seeds: int, took: float
) -> None:
    console.print(
        f"{seeds:,} seeds in {took:,.0f} s: {totals['OPERATIONS']:,} operations"
        f" (at least {totals['SMALLEST']} each), {totals['RUNS']:,} runs of handlers,"
        f" {totals['released'] / 10**6:,.2f} paid out, {totals['refunded'] / 10**6:,.2f} refunded,"
        f" {totals['SECONDS'] / 86_400:,.0f} simulated days"
    )
    plain = {
        name: count
        for name, count in totals.items()
        if not name.startswith("seeds with") and not name.isupper()
    }
    for name in sorted(plain):
        seen = totals[f"seeds with {name}"]
        console.print(f"  {name:44} {plain[name]:>14,}   in {seen:,} seeds", highlight=False)
    for report in sorted(failed, key=lambda report: report.seed):
        console.print(f"seed {report.seed}: {len(report.problems)} problems", style="red")
        for problem in report.problems[:5]:
            console.print(f"    {problem[:300]}", markup=False)
    console.print(
        f"{len(failed)} of {seeds:,} seeds broke a rule"
        + (": replay with make sim SEED=..." if failed else "")
    )


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def replay(seed: int, operations: int, mutation: str | None) -> int:
    """Runs one seed and prints all that happened."""
    with quietly():
        report = run_seed((seed, operations, mutation), trace=True)
    for line in report.trace:
        _say(line)
    for name in sorted(report.counts):
        _say(f"    {name:44} {report.counts[name]:>12,}")
    for problem in report.problems:
        _say(f"BROKEN: {problem}")
    _say(f"seed {seed}: {report.operations} operations, {len(report.problems)} problems")
    return 1 if report.problems else 0


def shrink(seed: int, operations: int, mutation: str | None) -> int:
    """Looks for the fewest operations after which this seed still breaks a rule."""
    low, high = 1, operations
    while low < high:
        middle = (low + high) // 2
        with quietly():
            broken = run_seed((seed, middle, mutation)).problems
        _say(f"{middle} operations: {broken[0][:120] if broken else 'all well'}")
        low, high = (low, middle) if broken else (middle + 1, high)
    _say(f"python -m tests.simulation --seed {seed} --operations {high}")
    return replay(seed, high, mutation)

"""`make faults`: thousands of schedules on all processors, a bar, and a summary.

    python -m tests.faults                        2,000 schedules for each database
    python -m tests.faults --seed 7 --schedules 100 --database sqlite
    python -m tests.faults --seed sqlite:7/42     one schedule again, until it fails or 20 times

What the machine does between processes is not drawn from the seed, so a replay may need a few
attempts. The folder of a failed schedule is kept: databases, logs, and the story with its times.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests.faults.board import SIDES
from tests.faults.children import Child, Family, freeze, learn
from tests.faults.lane import Lane
from tests.faults.mutants import MUTANTS
from tests.faults.points import POINTS
from tests.faults.schedules import Setting, draw
from tests.faults.story import Run

SCHEDULES = 2000
REPLAYS = 20
DATABASES = ("sqlite", "postgresql")
_ORDER = struct.Struct("q")


@dataclass
class Summary:
    """What a whole run came to."""

    seed: str
    done: int = 0
    seconds: float = 0.0
    passed: list[int] = field(default_factory=lambda: [0] * len(POINTS) * 2)
    drawn: Counter[str] = field(default_factory=Counter)
    fired: Counter[str] = field(default_factory=Counter)
    figures: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)
    broken: str = ""

    def add(self, result: dict[str, Any]) -> None:
        """Takes in the result of one schedule."""
        self.done += 1
        self.seconds += result["seconds"]
        self.passed = [a + b for a, b in zip(self.passed, result["passed"], strict=True)]
        self.drawn.update(result["drawn"])
        self.fired.update(result["fired"])
        self.figures.update(result["figures"])
        for name in result["figures"]:
            self.examples.setdefault(name, result["seed"])
        if result["problems"]:
            self.failures.append(result)

    def print(self, console: Console, *, whole: bool) -> None:
        """Prints the tables, and each failure with the command that replays it."""
        if whole:
            console.print(self._points())
            console.print(self._faults())
        missed = [label for label, passes in self._labels() if not passes]
        if missed and whole:
            console.print(f"never passed: {', '.join(missed)}")
        for name, count in sorted(self.figures.items()):
            example = f" (first in {self.examples[name]})" if count < self.done else ""
            console.print(f"  {count:>12,} {name}{example}", markup=False, soft_wrap=True)
        console.print(
            f"seed {self.seed}: {self.done:,} schedules, {sum(self.fired.values()):,} faults;"
            f" [bold]{len(self.failures)} failed[/]"
        )
        for failure in self.failures:
            console.print(f"\n[red]{failure['seed']}[/] kept in {failure['kept']}")
            for problem in failure["problems"]:
                console.print(f"  {problem}", markup=False, soft_wrap=True)
            console.print(f"  make faults SEED={failure['seed']}", markup=False)

    def _labels(self) -> Iterator[tuple[str, int]]:
        for number, point in enumerate(POINTS):
            for side, name in enumerate(SIDES):
                yield f"{point.name} {name}", self.passed[2 * number + side]

    def _points(self) -> Table:
        table = Table("failpoint", title="failpoints: passed, and struck")
        for side in SIDES:
            table.add_column(f"{side}: passed", justify="right")
            table.add_column("struck", justify="right")
        for number, point in enumerate(POINTS):
            cells = [point.name]
            for place, side in enumerate(SIDES):
                struck = self.fired[f"{point.name} {side}"]
                cells += [f"{self.passed[2 * number + place]:,}", f"{struck}"]
            table.add_row(*cells)
        return table

    def _faults(self) -> Table:
        table = Table("fault", title="other faults")
        table.add_column("drawn", justify="right")
        table.add_column("struck", justify="right")
        named = {f"{point.name} {side}" for point in POINTS for side in SIDES}
        for label in sorted(self.drawn.keys() - named):
            table.add_row(label, f"{self.drawn[label]}", f"{self.fired[label]}")
        return table


@dataclass
class Runner:
    """Forks the lanes and hands the schedules out, to whoever is free."""

    setting: Setting
    seed: str
    folder: Path
    keep: Path
    jobs: int
    mutant: str = ""

    def run(self, numbers: list[int], *, until_failure: bool = False) -> Summary:
        """Runs the schedules of these numbers; a bar tells how far it is."""
        summary = Summary(f"{self.setting.database}:{self.seed}")
        reading, writing = os.pipe()
        family = Family()
        lanes = [self._lane(family, reading, writing, number) for number in range(self.jobs)]
        os.close(reading)
        os.set_blocking(writing, False)
        console = Console(stderr=True, emoji=False)
        with _bar(console) as bar, contextlib.suppress(KeyboardInterrupt):
            task = bar.add_task(self.setting.database, total=len(numbers), failed=0)
            left, heard = list(numbers), dict.fromkeys(lanes, 0)
            while summary.done < len(numbers) and all(lane.alive for lane in lanes):
                left = _hand_out(writing, left)
                family.turn()
                for line in (line for lane in lanes for line in _new_lines(lane, heard)):
                    result = json.loads(line)
                    summary.add(result)
                    bar.update(task, advance=1, failed=len(summary.failures))
                    if result["problems"]:
                        bar.console.print(f"[red]failed[/] {result['seed']}")
                if until_failure and summary.failures:
                    break
        os.close(writing)
        summary.broken = next((lane.name for lane in lanes if not lane.alive), "")
        if summary.broken and summary.done < len(numbers):
            console.print((self.folder / f"{summary.broken}.log").read_text()[-3000:], markup=False)
        family.kill_all()
        return summary

    def _lane(self, family: Family, reading: int, writing: int, number: int) -> Child:
        def work(pipe: int) -> None:
            os.close(writing)
            lane = Lane(self.folder / f"lane{number}", self.setting.database, mutant=self.mutant)
            try:
                while order := os.read(reading, _ORDER.size):
                    seed = f"{self.setting.database}:{self.seed}/{_ORDER.unpack(order)[0]}"
                    _tell(pipe, self._one(lane, seed))
            finally:
                lane.close()

        return family.fork(f"lane{number}", self.folder / f"lane{number}.log", work)

    def _one(self, lane: Lane, seed: str) -> dict[str, Any]:
        run = lane.run(draw(seed, self.setting))
        print(f"{seed} took {run.seconds:.1f} s", flush=True)  # noqa: T201 (into the lane's log)
        kept = ""
        if run.problems:
            place = self.keep / seed.replace(":", "-").replace("/", "-")
            shutil.rmtree(place, ignore_errors=True)
            kept = str(shutil.copytree(run.folder, place))
            (place / "problems.txt").write_text("\n".join([seed, *run.problems]) + "\n")
        return _result(run, seed, kept)


def warm_up() -> None:
    """Runs one quiet schedule, so that everything that is ever imported is imported here."""
    with scratch() as folder:
        lane = Lane(folder / "lane")
        try:
            lane.run(replace(draw("sqlite:warm/0", Setting()), faults=[], restarts=()))
        finally:
            lane.close()
        learn(folder)
    freeze()


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for everything that is written, in memory where there is one: it is a lot."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="x402mw-faults-", dir=place) as folder:
        yield Path(folder)


def _result(run: Run, seed: str, kept: str) -> dict[str, Any]:
    return {
        "seed": seed,
        "kept": kept,
        "seconds": run.seconds,
        "problems": run.problems,
        "passed": run.passed,
        "drawn": [fault.label for fault in run.schedule.faults],
        "fired": sorted(run.fired),
        "figures": run.figures,
    }


def _tell(pipe: int, result: dict[str, Any]) -> None:
    data = json.dumps(result).encode() + b"\n"
    while data:
        data = data[os.write(pipe, data) :]


def _hand_out(writing: int, left: list[int]) -> list[int]:
    """Keeps the queue filled; a pipe holds some thousands."""
    try:
        while left:
            os.write(writing, _ORDER.pack(left[0]))
            left = left[1:]
    except BlockingIOError:
        pass
    return left


def _new_lines(lane: Child, heard: dict[Child, int]) -> list[bytes]:
    new = lane.said[heard[lane] :]
    whole = new.rfind(b"\n") + 1
    heard[lane] += whole
    return new[:whole].splitlines()


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failed]} failed"),
        console=console,
    )


def main() -> int:
    """Reads the command line and runs; the exit status tells whether anything failed."""
    # Whoever ends a run early sees what it came to until then.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__)
    parser.add_argument("--schedules", type=int, default=SCHEDULES)
    parser.add_argument("--seed", default="")
    parser.add_argument("--database", choices=DATABASES, action="append")
    parser.add_argument("--focus", default="", help="a part of the label of a fault")
    parser.add_argument("--jobs", type=int, default=1 + (os.cpu_count() or 1))
    parser.add_argument("--mutant", choices=MUTANTS, default="")
    parser.add_argument("--until-failure", action="store_true")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "x402mw-faults")
    given = parser.parse_args()
    warm_up()
    focus = given.focus or MUTANTS.get(given.mutant, "")
    seed = given.seed or str(random.SystemRandom().randrange(1_000_000))
    numbers, databases = list(range(given.schedules)), given.database or list(DATABASES)
    replay = ":" in seed
    if replay:
        database, _, rest = seed.partition(":")
        seed, _, number = rest.rpartition("/")
        numbers, databases = [int(number)] * REPLAYS, [database]
    failed = 0
    for database in databases:
        with scratch() as folder:
            runner = Runner(
                Setting(database, focus), seed, folder, given.keep, given.jobs, given.mutant
            )
            summary = runner.run(numbers, until_failure=replay or given.until_failure)
        summary.print(Console(emoji=False), whole=not (replay or given.until_failure))
        failed += len(summary.failures) + bool(summary.broken)
    return int(failed > 0)

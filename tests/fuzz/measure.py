"""What the corpus alone reaches: `python -m tests.fuzz.measure` prints branches by module.

Its exit status is 1 when the decoders together, or one of them, are below the goal.
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import coverage

DECODERS = (
    "strict",
    "headers",
    "vouchers",
    "tokens",
    "terms",
    "messages",
    "keys",
    "ids",
    "amounts",
)
DECODERS += ("routes",)
PERCENT_MIN = 95.0


def replay_decoders() -> int:
    """Runs every input of every decoder target once; returns how many there were."""
    # Imported late: what a module does when it is imported is measured too.
    from tests.fuzz import corpus
    from tests.fuzz.targets import TARGETS

    count = 0
    for name, target in TARGETS.items():
        if target.decoder:
            for data in corpus.load(name):
                target.check(data)
                count += 1
    return count


def measure() -> tuple[int, dict[str, Any]]:
    """Replays under coverage; returns the count of inputs, and (reached, branches) by module."""
    modules = [f"x402mw.core.{name}" for name in DECODERS]
    watch = coverage.Coverage(branch=True, data_file=None, config_file=False, source_pkgs=modules)
    watch.start()
    count = replay_decoders()
    watch.stop()
    with tempfile.NamedTemporaryFile(suffix=".json") as report, contextlib.redirect_stdout(None):
        watch.json_report(outfile=report.name)
        files = json.loads(Path(report.name).read_text())["files"]
    figures = {Path(name).stem: one["summary"] for name, one in files.items()}
    return count, figures


def main() -> int:
    """Prints the table and judges it."""
    count, figures = measure()
    print(f"{'decoder':<12}{'branches':>10}{'reached':>10}{'percent':>10}")  # noqa: T201
    totals = [0, 0]
    for name, one in sorted(figures.items()):
        _print_row(name, one["covered_branches"], one["num_branches"])
        totals = [totals[0] + one["covered_branches"], totals[1] + one["num_branches"]]
    percent = _print_row("all", *totals)
    print(f"{count} inputs replayed; the goal is {PERCENT_MIN:.0f} % of the branches")  # noqa: T201
    return 0 if percent >= PERCENT_MIN else 1


def _print_row(name: str, reached: int, branches: int) -> float:
    percent = 100.0 * reached / branches if branches else 100.0
    print(f"{name:<12}{branches:>10}{reached:>10}{percent:>9.1f}%")  # noqa: T201
    return percent


if __name__ == "__main__":
    sys.exit(main())

"""`make fuzz`: every target under coverage-guided fuzzing, for a while each.

    python -m tests.fuzz.run [--seconds 60] [--seed N] [--jobs 2] [--keep] [TARGET ...]
    python -m tests.fuzz.run --replay TARGET FILE

A failing input is written to a file, with the command that replays it. `--keep` packs what was
found into the corpus. At the end stands what the corpus alone reaches of the decoders.
"""

import argparse
import random
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz import corpus
from tests.fuzz.reduce import reduce
from tests.fuzz.targets import SERVICES, TARGETS

CRASHES = Path("fuzz-crashes")
INPUT_SECONDS_MAX = 20
KEPT_BYTES = 20_000
_STATUS = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)")
_COUNT = re.compile(r"stat::number_of_executed_units:\s*(\d+)")


@dataclass(frozen=True)
class Result:
    """What became of one target."""

    name: str
    executions: int
    edges: int
    features: int
    seconds: float
    crash: Path | None


def fuzz(name: str, *, seconds: int, seed: int, keep: bool) -> Result:
    """Fuzzes one target in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="x402mw-fuzz-") as folder:
        inputs = Path(folder)
        for number, data in enumerate([*TARGETS[name].seeds(), *corpus.load(name)]):
            (inputs / f"seed-{number}").write_bytes(data)
        begun = time.monotonic()
        limits = [f"-max_total_time={seconds}", f"-seed={seed}", f"-timeout={INPUT_SECONDS_MAX}"]
        done = _libfuzzer(name, inputs, *limits, "-print_final_stats=1")
        crash = _crash(name) if done.returncode else None
        if crash is not None:
            crash.with_suffix(".log").write_text(done.stderr)
        if keep and crash is None:
            found = [path.read_bytes() for path in inputs.iterdir()]
            corpus.save(name, reduce(TARGETS[name].check, found, KEPT_BYTES))
        status = _STATUS.findall(done.stderr) or [(0, 0, 0)]
        count = _COUNT.search(done.stderr)
        return Result(
            name=name,
            executions=int(count[1]) if count else 0,
            edges=int(status[-1][0]),
            features=int(status[-1][1]),
            seconds=time.monotonic() - begun,
            crash=crash,
        )


def _libfuzzer(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    CRASHES.mkdir(exist_ok=True)
    history = CRASHES / f"{name}.history"
    options = [
        *(f"-artifact_prefix={CRASHES}/{name}-", f"-max_len={TARGETS[name].bytes_max}"),
        *("-rss_limit_mb=4096", "-len_control=0"),
    ]
    command = [sys.executable, "-m", "tests.fuzz.child", name, history, *options, *arguments]
    return subprocess.run(
        [str(one) for one in command],
        capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip


def _crash(name: str) -> Path:
    """The file to replay: a service needs all that it was fed, a decoder the one input."""
    if name in SERVICES and (CRASHES / f"{name}.history").exists():
        return CRASHES / f"{name}.history"
    found = sorted(CRASHES.glob(f"{name}-*"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else CRASHES / f"{name}.log"


def replay(name: str, path: Path) -> None:
    """Runs one input again, or all that a service was fed."""
    if path.suffix == ".history":
        for line in path.read_text().split():
            TARGETS[name].check(bytes.fromhex(line))
    else:
        TARGETS[name].check(path.read_bytes())


def main() -> int:
    """Runs what the command line asks for; the exit status is 1 if anything fell short."""
    parser = argparse.ArgumentParser(description="fuzzes every decoder and both services")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=random.randrange(1, 2**31))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="pack what is found into the corpus")
    parser.add_argument("--replay", nargs=2, metavar=("TARGET", "FILE"))
    options = parser.parse_args()
    if options.replay:
        replay(options.replay[0], Path(options.replay[1]))
        say("no rule was broken")
        return 0
    say(f"seed {options.seed}, {options.seconds} s for each target")
    say(f"{'target':<10}{'executions':>12}{'per second':>12}{'edges':>8}{'features':>10}")

    def work(name: str) -> Result:
        result = fuzz(name, seconds=options.seconds, seed=options.seed, keep=options.keep)
        show(result)
        return result

    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(work, options.targets or TARGETS))
    say(f"{sum(one.executions for one in results)} executions, seed {options.seed}\n")
    # In a process of its own: nothing that is measured may be imported before.
    status = subprocess.run([sys.executable, "-m", "tests.fuzz.measure"], check=False).returncode
    return 1 if any(one.crash for one in results) else status


def show(result: Result) -> None:
    """Prints the line of one target, and how to replay its failure."""
    rate = result.executions / max(result.seconds, 1)
    figures = f"{result.executions:>12}{rate:>12.0f}{result.edges:>8}{result.features:>10}"
    say(f"{result.name:<10}{figures}")
    if result.crash is not None:
        say(f"  FAILED: python -m tests.fuzz.run --replay {result.name} {result.crash}")


def say(text: str) -> None:
    """Prints a line at once."""
    print(text, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())

"""A few fault schedules in the default run, and the proof that the harness can fail.

`make faults` runs thousands of them (`docs/testing.md`).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.mutants import MUTANTS
from tests.faults.points import ERRORS, POINTS, find
from tests.faults.schedules import Setting, draw

pytestmark = pytest.mark.whole
ROOT = Path(__file__).parents[2]
SMOKE = 20
SMOKE_SEED = "smoke"
FEW = ("sign-anew", "ask-twice")


def faults(*arguments: str, keep: Path) -> subprocess.CompletedProcess[str]:
    """Runs the harness in a fresh interpreter: it forks, so it must be alone in its process."""
    return subprocess.run(
        [sys.executable, "-m", "tests.faults", "--keep", str(keep), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_every_failpoint_exists() -> None:
    """A failpoint names a function that is there, so that no refactoring silently removes it."""
    for point in POINTS:
        holder, name, found = find(point.target)
        assert callable(getattr(holder, name)), point.name
        assert found is not None
        assert not point.error or point.error in ERRORS


def test_failpoints_have_names_of_their_own() -> None:
    """No function is wrapped twice under two names, and no two points share a name."""
    assert len({point.name for point in POINTS}) == len(POINTS)
    assert len({point.target for point in POINTS}) == len(POINTS)


def test_a_seed_is_one_schedule() -> None:
    """The same seed gives the same calls and the same faults."""
    assert draw("sqlite:7/3", Setting()) == draw("sqlite:7/3", Setting())
    assert draw("sqlite:7/3", Setting()) != draw("sqlite:7/4", Setting())


def test_nothing_is_lost_doubled_or_stuck(tmp_path: Path) -> None:
    """After some two dozen schedules of kills and faults the oracle finds nothing wrong."""
    settings = ("--database", "sqlite", "--schedules", str(SMOKE), "--seed", SMOKE_SEED)
    done = faults(*settings, keep=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


@pytest.mark.parametrize("mutant", tuple(MUTANTS) if os.environ.get("X402MW_LONG") else FEW)
def test_the_oracle_catches(mutant: str, tmp_path: Path) -> None:
    """A deliberate bug is found within some schedules: the harness can fail."""
    settings = ("--database", "sqlite", "--schedules", "200", "--until-failure")
    done = faults(*settings, "--mutant", mutant, keep=tmp_path)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    assert "kept in" in done.stdout

"""Some seeds of the simulation, in every run; `make sim` runs ten thousand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.runner import quietly, run_seed
from tests.simulation.world import OPERATIONS

LONG = bool(os.environ.get("X402MW_LONG"))
SEEDS = range(1, 201 if LONG else 21)
REGRESSIONS: tuple[int, ...] = ()
"""Seeds that once found something."""

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("seed", [*SEEDS, *REGRESSIONS])
def test_no_rule_breaks_in_a_world_where_everything_goes_wrong(seed: int) -> None:
    """I1 to I19 and the printed bounds hold at the end of a few hundred faulty operations."""
    with quietly():
        report = run_seed((seed, OPERATIONS, None))
    assert report.operations >= OPERATIONS
    assert report.problems == []


def test_a_seed_replays_exactly() -> None:
    """The same seed tells the same story in any process, whatever its hashes."""
    asked = "from tests.simulation.runner import replay; replay(3, 60, None)"
    told = []
    for hashes in ("1", "2"):
        environment = {
            **os.environ,
            "PYTHONHASHSEED": hashes,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "client")]),
        }
        command = [sys.executable, "-c", asked]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
        told.append(done.stdout)
    assert told[0] == told[1]
    assert "quiet" in told[0]

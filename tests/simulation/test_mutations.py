"""The simulation can fail: bugs put in on purpose are found within a few seeds."""

import os

import pytest

from tests.simulation.mutations import MUTATIONS
from tests.simulation.runner import quietly, run_seed
from tests.simulation.world import OPERATIONS

LONG = bool(os.environ.get("X402MW_LONG"))
SEEDS_MAX = 30
FOUND_BY: dict[str, int] = {}
"""Mutations that the default run tries too, each with a seed that finds it."""


@pytest.mark.skipif(not LONG, reason="tries many seeds")
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_bug_is_found_within_thirty_seeds(name: str) -> None:
    """Whatever we break on purpose breaks a rule that the oracle watches."""
    for seed in range(5000, 5000 + SEEDS_MAX):
        with quietly():
            if run_seed((seed, OPERATIONS, name)).problems:
                return
    pytest.fail(f"{SEEDS_MAX} seeds did not find {name}")


@pytest.mark.parametrize(("name", "seed"), FOUND_BY.items())
def test_a_bug_is_found_by_its_seed(name: str, seed: int) -> None:
    """The same, for a few bugs and a seed each that is known to find it."""
    with quietly():
        assert run_seed((seed, OPERATIONS, name)).problems

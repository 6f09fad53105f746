"""The simulation can fail: bugs put in on purpose are found within a few seeds."""

import os

import pytest

from tests.simulation.mutations import MUTATIONS
from tests.simulation.runner import quietly, run_seed
from tests.simulation.world import OPERATIONS

LONG = bool(os.environ.get("X402MW_LONG"))
SEEDS_MAX = 30
QUICK = ("run-a-seq-twice", "serve-before-commit", "redeem-by-difference", "fee-per-release")
"""Bugs that nearly every seed finds: the default run tries these."""


@pytest.mark.parametrize("name", MUTATIONS if LONG else QUICK)
def test_a_bug_is_found_within_thirty_seeds(name: str) -> None:
    """Whatever we break on purpose breaks a rule that the oracle watches."""
    for seed in range(5000, 5000 + SEEDS_MAX):
        with quietly():
            if run_seed((seed, OPERATIONS, name)).problems:
                return
    pytest.fail(f"{SEEDS_MAX} seeds did not find {name}")

"""`python -m tests.simulation`: many seeds with a summary, or one seed again with its trace.

--seeds N        how many seeds, from --first on (1,000 from 1)
--seed N         one seed, printing its trace
--operations N   operations per seed, at least (200)
--mutation NAME  breaks the code on purpose (`mutations`), to see that it is found
--shrink         with --seed: looks for the fewest operations that still fail
"""

import argparse
import sys

from tests.simulation import runner
from tests.simulation.mutations import MUTATIONS
from tests.simulation.world import OPERATIONS


def main() -> int:
    """Reads the command line and runs; 1 if any rule was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--operations", type=int, default=OPERATIONS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--mutation", choices=sorted(MUTATIONS))
    parser.add_argument("--shrink", action="store_true")
    given = parser.parse_args()
    if given.seed is not None and given.shrink:
        return runner.shrink(given.seed, given.operations, given.mutation)
    if given.seed is not None:
        return runner.replay(given.seed, given.operations, given.mutation)
    seeds = range(given.first, given.first + given.seeds)
    return runner.run_many(seeds, given.operations, given.processes, given.mutation)


if __name__ == "__main__":
    sys.exit(main())

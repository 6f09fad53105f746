"""One target under libFuzzer, in a process of its own: `python -m tests.fuzz.child TARGET ...`.

The arguments after the target's name are libFuzzer's. `run` starts this; nobody else needs to.
"""

import sys
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["x402mw", "x402mw_client"]):
    from tests.fuzz.targets import SERVICES, TARGETS

OWN_MUTATIONS = 0.9


def main() -> None:
    """Fuzzes until libFuzzer's limits are reached or a check fails."""
    name, history = sys.argv[1], Path(sys.argv[2])
    target = TARGETS[name]
    seeds = target.seeds()

    def check(data: bytes) -> None:
        try:
            target.check(data)
        except BaseException:
            if name in SERVICES:
                lines = [one.hex() for one in SERVICES[name].history]
                history.write_text("\n".join(lines) + "\n")
            raise

    def mutate(data: bytes, bytes_max: int, seed: int) -> bytes:
        draw = Random(seed)
        if draw.random() > OWN_MUTATIONS:
            return bytes(atheris.Mutate(data, bytes_max))
        base = data if len(data) > 1 and draw.randrange(20) else draw.choice(seeds)
        return target.bend(base, draw)[:bytes_max]

    atheris.Setup([sys.argv[0], *sys.argv[3:]], check, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

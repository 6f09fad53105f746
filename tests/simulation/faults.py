"""What goes wrong, and when: chosen by the seed, healed after a while."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

from tests.simulation.network import Weather

KINDS: dict[str, float] = {
    "storm": 4,
    "provider dies": 2,
    "provider dies at a commit": 3,
    "provider's disk full": 1,
    "buyer dies": 2,
    "buyer dies at a commit": 3,
    "wallet's disk full": 0.5,
    "escrow away": 2,
    "escrow dies at a commit": 1.5,
    "escrow's disk full": 1,
    "parted": 3,
    "clock jumps": 1.5,
    "keys rotate": 0.7,
    "price changes": 0.7,
    "journal backed up": 0.7,
    "journal restored": 0.4,
    "wallet backed up": 0.5,
    "wallet restored": 0.4,
}
CALM = Weather()


class Faults:
    """The bad luck of one seed: which kinds there are at all, and how often."""

    def __init__(self, world: Any) -> None:
        self.world = world
        rng: random.Random = world.rng
        self.rng = rng
        self.period = rng.choice((8.0, 20.0, 60.0, 1e9))
        kinds = rng.sample(list(KINDS), rng.randrange(3, len(KINDS) + 1))
        self.kinds = {kind: KINDS[kind] for kind in kinds}

    async def run(self) -> None:
        """Lets things go wrong until the world is quiet."""
        while not self.world.quiet:
            await asyncio.sleep(self.rng.expovariate(1 / self.period))
            if self.world.quiet:
                return
            kind = self.rng.choices(list(self.kinds), list(self.kinds.values()))[0]
            happen: Callable[[], Any] = getattr(self, "_" + kind.replace(" ", "_").replace("'", ""))
            if happen() is not False:
                self.world.operation(f"fault: {kind}")

    def _for_a_while(self, seconds: tuple[float, ...], undo: Callable[[], Any]) -> None:
        self.world.later(self.rng.choice(seconds), undo)

    def _storm(self) -> None:
        rough = self.rng.choice((0.02, 0.1, 0.3))

        def pick() -> float:
            return self.rng.choice((0.0, rough, rough / 3))

        self.world.network.weather = Weather(
            latency=self.rng.choice((0.001, 0.05, 0.5)),
            slow=pick(),
            lose_request=pick(),
            lose_answer=pick(),
            double=pick(),
            late_double=pick(),
            cut=pick(),
            garbage=pick() / 2,
        )
        self._for_a_while((10, 30, 90), self._calm)

    def _calm(self) -> None:
        self.world.network.weather = CALM

    def _provider(self) -> Any:
        return self.rng.choice(self.world.providers)

    def _buyer(self) -> Any:
        return self.rng.choice(self.world.buyers)

    def _provider_dies(self) -> None:
        self._provider().kill(all_of_them=self.rng.random() < 0.5)

    def _provider_dies_at_a_commit(self) -> None:
        self._provider().disk.crash = self.rng.choice(("before", "after"))

    def _providers_disk_full(self) -> None:
        provider = self._provider()
        provider.disk.full = True
        provider.disturb()

        def empty() -> None:
            provider.disk.full = False
            provider.disturb()

        self._for_a_while((2, 10, 40), empty)

    def _buyer_dies(self) -> None:
        self._buyer().kill(all_of_them=self.rng.random() < 0.5)

    def _buyer_dies_at_a_commit(self) -> None:
        self._buyer().disk.crash = self.rng.choice(("before", "after"))

    def _wallets_disk_full(self) -> None:
        buyer = self._buyer()
        buyer.disk.full = True
        self._for_a_while((2, 10, 40), lambda: setattr(buyer.disk, "full", False))

    def _escrow_away(self) -> None:
        self.world.escrow.kill()
        self.world.heal_escrow(self.rng.choice((3.0, 20.0, 100.0, 100.0, 700.0)))

    def _escrow_dies_at_a_commit(self) -> None:
        self.world.escrow.crash = self.rng.choice(("before", "after"))
        self.world.heal_escrow(10.0)

    def _escrows_disk_full(self) -> None:
        self.world.escrow.crash = "full"

    def _parted(self) -> None:
        ends = [self._provider().host, "escrow.example", self._buyer().name]
        here, there = self.rng.sample(ends, 2)
        here, there = (
            end.removesuffix(".example") if end != "escrow.example" else end
            for end in (here, there)
        )
        pair = self.world.part(here, there)
        self._for_a_while((3, 20, 60, 150), lambda: self.world.network.parted.discard(pair))

    def _clock_jumps(self) -> None:
        party = self.rng.choice([*self.world.providers, *self.world.buyers, self.world.escrow])
        by = self.rng.choice((-300, -40, -5, 5, 25, 100, 400))
        clock = party.clock
        clock.offset += by
        party.excused = True
        if party is self.world.escrow and by > 0:
            return

        def set_right() -> None:
            # Once the world is healed every clock is right already.
            if not self.world.quiet:
                clock.offset -= by

        self._for_a_while((20, 90, 200), set_right)

    def _keys_rotate(self) -> Any:
        if not self.world.escrow.up:
            return False
        self.world.escrow.process.spawn(self.world.escrow.ledger.rotate_keys())
        return None

    def _price_changes(self) -> Any:
        provider = self._provider()
        provider.quote = self.rng.choice(("0.01", "0.012", "0.005"))
        provider.kill(all_of_them=True)

    def _journal_backed_up(self) -> None:
        self._provider().back_up()

    def _journal_restored(self) -> Any:
        return self._provider().restore()

    def _wallet_backed_up(self) -> None:
        self._buyer().back_up()

    def _wallet_restored(self) -> Any:
        return self._buyer().restore()

"""Provider and escrow killed in mid-run, twenty times: nothing lost, nothing doubled."""

import asyncio
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.support.market import Market, open_market
from tests.support.postgresql import fresh_database
from x402mw.core.amounts import to_atomic
from x402mw.core.errors import (
    EscrowUnavailable,
    PaidOutcomeGone,
    PaymentOutcomeUnknown,
    PaymentRefused,
)
from x402mw_client import Limits, PaymentTransport, Wallet

pytestmark = [pytest.mark.anyio, pytest.mark.whole]

LONG = bool(os.environ.get("X402MW_LONG"))
KILLS = 20 if LONG else 8
WORKER_KILLS = 30 if LONG else 6
BUYERS = 4
ANSWERS_BETWEEN_KILLS = 12
SEED = 402


@dataclass
class Shopper:
    """Buys items with unique names, and notes what became of each."""

    market: Market
    transport: PaymentTransport
    http: httpx.AsyncClient
    outcomes: Counter[str] = field(default_factory=Counter)
    answered: list[str] = field(default_factory=list)
    progress: asyncio.Condition = field(default_factory=asyncio.Condition)
    ended: bool = False

    async def shop(self, buyer: int) -> None:
        """Buys until told to end."""
        number = 0
        while not self.ended:
            number += 1
            outcome = await self.buy(f"k{buyer}-{number}")
            async with self.progress:
                self.outcomes[outcome] += 1
                self.progress.notify_all()

    async def buy(self, name: str) -> str:
        """Buys one item and follows it to a certain end."""
        work = self.http.get(f"{self.market.shop.url}/item/{name}?sleep=5")
        while True:
            try:
                answer = await work
            except PaymentOutcomeUnknown as unknown:
                await asyncio.sleep(0.1)  # The provider is down: this is the caller's own pace.
                work = unknown.handle.resume(self.transport)
                continue
            except PaymentRefused:
                return "given up"
            except PaidOutcomeGone:
                return "answer gone"
            except (httpx.TransportError, EscrowUnavailable):
                # Nothing was signed yet, or its sending never began.
                await asyncio.sleep(0.1)
                return "not sent"
            if answer.status_code == 200:
                self.answered.append(name)
            return str(answer.status_code)

    async def kill_in_mid_run(self, dice: random.Random) -> None:
        """Kills one process once some more answers have come, and starts it again at once."""
        victim = dice.choice([self.market.shop, self.market.escrow])
        await self.serve_some_more(dice)
        victim.kill()
        await asyncio.to_thread(victim.start)

    async def kill_a_worker(self, dice: random.Random) -> None:
        """Kills one of the shop's workers; uvicorn starts it again."""
        await self.serve_some_more(dice)
        dice.choice(self.market.shop.worker_processes()).kill()

    async def serve_some_more(self, dice: random.Random) -> None:
        """Waits until some more answers have come."""
        wanted = len(self.answered) + dice.randint(1, ANSWERS_BETWEEN_KILLS)
        async with self.progress:
            await asyncio.wait_for(
                self.progress.wait_for(lambda: len(self.answered) >= wanted), timeout=60
            )


async def test_kills_in_mid_run(tmp_path: Path) -> None:
    """After SIGKILLs at any moment each call ran at most once, and all books agree to the unit."""
    with open_market(tmp_path) as market:
        await shop_through(market, [Shopper.kill_in_mid_run] * KILLS)


async def test_killed_workers(tmp_path: Path) -> None:
    """Three workers on one journal, killed one by one under load: the books agree all the same."""
    with open_market(tmp_path, workers=3) as market:
        await shop_through(market, [Shopper.kill_a_worker] * WORKER_KILLS)


@pytest.mark.skipif(not LONG, reason="the dead are given half a minute: X402MW_LONG=1")
async def test_killed_workers_on_postgresql(tmp_path: Path) -> None:
    """The same with the journal in PostgreSQL."""
    with (
        fresh_database() as journal,
        open_market(tmp_path, workers=3, journal=journal) as market,
    ):
        await shop_through(market, [Shopper.kill_a_worker] * WORKER_KILLS)


Fault = Callable[[Shopper, random.Random], Awaitable[None]]


async def shop_through(market: Market, faults: list[Fault]) -> None:
    """Buys while things are killed, one after the other, and then compares all books."""
    wallet = Wallet(
        escrow=market.escrow.url,
        api_key=market.buyer.api_key,
        limits=Limits(per_request="0.01", total="20.00"),
        deposit="5.00",
    )
    transport = PaymentTransport(wallet)
    http = httpx.AsyncClient(transport=transport, timeout=20)
    shopper = Shopper(market, transport, http)
    dice = random.Random(SEED)
    async with asyncio.TaskGroup() as group:
        for buyer in range(BUYERS):
            group.create_task(shopper.shop(buyer))
        for fault in faults:
            await fault(shopper, dice)
        shopper.ended = True
    spent = wallet.spent
    await http.aclose()
    ran = market.shop.executions()
    answered = Counter(shopper.answered)
    assert max(ran.values()) == 1
    assert max(answered.values()) == 1
    assert answered.keys() <= ran.keys()
    assert spent == 1000 * (len(answered) + shopper.outcomes["answer gone"])
    sessions = market.sessions()
    assert all(to_atomic(session["remaining"]) == 0 for session in sessions)
    released = sum(to_atomic(session["released"]) for session in sessions)
    fees = sum(to_atomic(session["fee"]) for session in sessions)
    assert released == spent
    assert to_atomic(market.balance(market.seller)) == released - fees
    assert to_atomic(market.balance(market.buyer)) == 50_000_000 - released
    market.escrow.check()

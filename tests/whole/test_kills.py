"""Provider and escrow killed in mid-run, twenty times: nothing lost, nothing doubled."""

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.support.market import Market, open_market
from x402mw.core.amounts import to_atomic
from x402mw.core.errors import (
    EscrowUnavailable,
    PaidOutcomeGone,
    PaymentOutcomeUnknown,
    PaymentRefused,
)
from x402mw_client import Limits, PaymentTransport, Wallet

pytestmark = [pytest.mark.anyio, pytest.mark.whole]

KILLS = 20
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
        wanted = len(self.answered) + dice.randint(1, ANSWERS_BETWEEN_KILLS)
        async with self.progress:
            await asyncio.wait_for(
                self.progress.wait_for(lambda: len(self.answered) >= wanted), timeout=60
            )
        victim.kill()
        await asyncio.to_thread(victim.start)


async def test_twenty_kills(tmp_path: Path) -> None:
    """After SIGKILLs at any moment each call ran at most once, and all books agree to the unit."""
    with open_market(tmp_path) as market:
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
            for _ in range(KILLS):
                await shopper.kill_in_mid_run(dice)
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

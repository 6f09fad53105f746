"""The escrow goes away and comes back, on a clock that the test moves; all sockets are real."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tests.support.escrow import Agent, MovingClock, RunningEscrow, running_escrow
from tests.support.gate import Gate
from tests.support.serving import serving
from x402mw.core.amounts import to_atomic
from x402mw.core.errors import PaymentOutcomeUnknown, X402mwError
from x402mw.provider import PaymentMiddleware, PerCall, Provider
from x402mw_client import Limits, PaymentTransport, Wallet

pytestmark = [pytest.mark.anyio, pytest.mark.whole]


class Recording(httpx.AsyncBaseTransport):
    """Keeps every answer's status, reason and `Retry-After`."""

    def __init__(self) -> None:
        self.inner = httpx.AsyncHTTPTransport()
        self.answers: list[tuple[int, str, str | None]] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        answer = await self.inner.handle_async_request(request)
        if answer.status_code >= 400:
            await answer.aread()
            code = answer.json()["code"]
            self.answers.append((answer.status_code, code, answer.headers.get("retry-after")))
        return answer

    async def aclose(self) -> None:
        await self.inner.aclose()


@dataclass
class Scene:
    """An escrow behind a gate, a provider that knows it through the gate, and a buyer."""

    escrow: RunningEscrow
    gate: Gate
    clock: MovingClock
    buyer_clock: MovingClock
    shop: str
    seller: Agent
    wallet: Wallet
    http: httpx.AsyncClient
    transport: PaymentTransport
    recording: Recording

    async def buy(self) -> httpx.Response:
        return await self.http.get(f"{self.shop}/item", timeout=3)

    async def earned(self) -> int:
        """What the seller's account holds, once the provider has had time to redeem."""
        url = f"{self.escrow.url}/api/v1/agents/me"
        async with httpx.AsyncClient() as http:
            answer = await http.get(url, headers=self.seller.headers)
        return to_atomic(answer.json()["balance"])

    async def wait_until_earned(self, amount: int) -> None:
        """Asks until the provider has redeemed that much, which it does in the background."""
        with anyio.fail_after(45):
            while await self.earned() != amount:  # noqa: ASYNC110 (it changes in the escrow)
                await anyio.sleep(0.05)


async def sell(request: Request) -> JSONResponse:
    return JSONResponse({"sold": True})


@asynccontextmanager
async def scene(tmp_path: Path, **options: str) -> AsyncIterator[Scene]:
    clock, buyer_clock = MovingClock(), MovingClock()
    async with (
        running_escrow(tmp_path, clock) as escrow,
        Gate(int(escrow.url.rpartition(":")[2])) as gate,
    ):
        seller, buyer = await escrow.new_agent("s"), await escrow.new_agent("b", balance="20.00")
        provider = Provider(
            escrow=gate.url,
            api_key=seller.api_key,
            journal=str(tmp_path / "journal.db"),
            clock=clock,
            redeem_seconds=5,
            **options,
        )
        app = Starlette(routes=[Route("/item", sell)])
        prices = {"GET /item": PerCall("0.01")}
        app.add_middleware(PaymentMiddleware, provider=provider, prices=prices)
        limits = Limits(per_request="0.01", total="5.00")
        wallet = Wallet(
            escrow=gate.url,
            api_key=buyer.api_key,
            limits=limits,
            deposit="2.00",
            clock=buyer_clock,
        )
        recording = Recording()
        transport = PaymentTransport(wallet, inner=recording, keep_sessions=True)
        async with serving(app) as shop, httpx.AsyncClient(transport=transport) as http:
            yield Scene(
                escrow, gate, clock, buyer_clock, shop, seller, wallet, http, transport, recording
            )
            gate.open()


async def test_calls_go_on_until_the_token_ends_and_again_afterwards(tmp_path: Path) -> None:
    """With the escrow away paid calls go on; then 503 with `Retry-After`; then on again."""
    async with scene(tmp_path) as s:
        assert (await s.buy()).status_code == 200
        await s.gate.shut()
        s.clock.advance(400)
        s.buyer_clock.advance(400)
        assert (await s.buy()).status_code == 200
        # Now the token ends by the provider's clock; the buyer's is a little behind.
        s.clock.advance(300)
        s.recording.answers.clear()
        with pytest.raises(PaymentOutcomeUnknown) as unknown:
            await s.buy()
        assert s.recording.answers[0][:2] == (503, "escrow_away")
        assert int(s.recording.answers[0][2] or "0") > 0
        assert all(status == 503 for status, _, _ in s.recording.answers)
        s.gate.open()
        s.buyer_clock.advance(300)
        await s.wait_until_earned(2 * 9_900)
        answer = await unknown.value.handle.resume(s.transport)
        assert answer.status_code == 200, (answer.text, s.recording.answers)
        assert (await s.buy()).status_code == 200


async def test_credit_is_bounded_while_the_escrow_is_away(tmp_path: Path) -> None:
    """At most `unredeemed_max` is served while the escrow is away; then 503, and nothing runs."""
    async with scene(tmp_path, unredeemed_max="0.05") as s:
        assert (await s.buy()).status_code == 200
        s.clock.advance(6)
        await s.wait_until_earned(9_900)
        await s.gate.shut()
        s.clock.advance(60)
        s.buyer_clock.advance(60)
        served = 0
        s.recording.answers.clear()
        for _ in range(6):
            try:
                served += (await s.buy()).status_code == 200
            except X402mwError:
                break
        assert served == 5
        assert s.recording.answers[0][:2] == (503, "max_unredeemed")


async def test_a_deadline_that_passed_during_the_outage_takes_nothing(tmp_path: Path) -> None:
    """What a provider earned is still paid although every deadline passed while it was down."""
    async with scene(tmp_path) as s:
        for _ in range(3):
            assert (await s.buy()).status_code == 200
        await s.gate.shut()
        s.clock.advance(3 * 3600)
        s.gate.open()
        await s.wait_until_earned(3 * 9_900)

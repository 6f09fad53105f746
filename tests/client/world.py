"""One scripted market with a wallet in it, reached through the async or the sync transport."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.client.scripted import ESCROW, ORIGIN, Answer, Clock, ScriptedProvider
from tests.client.scripted_escrow import ScriptedEscrow
from tests.support import payments as p
from x402mw_client import Limits, PaymentTransport, SyncPaymentTransport, Wallet
from x402mw_client.escrow import AsyncEscrowClient, EscrowClient


class ScriptedWallet(Wallet):
    """A wallet whose escrow is the scripted one."""

    def __init__(self, handler: Answer, **settings: Any) -> None:
        self._handler = handler
        super().__init__(escrow=ESCROW, api_key="pf_live_secret", **settings)

    def async_escrow(self) -> AsyncEscrowClient:
        client = httpx.AsyncClient(transport=httpx.MockTransport(self._handler))
        return AsyncEscrowClient(ESCROW, "pf_live_secret", client=client)

    def sync_escrow(self) -> EscrowClient:
        client = httpx.Client(transport=httpx.MockTransport(self._handler))
        return EscrowClient(ESCROW, "pf_live_secret", client=client)


LIMITS = Limits(per_request="0.01", total="1.00")


@dataclass
class World:
    """Escrow, provider and one wallet, reached through the async or the sync transport."""

    kind: str
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.escrow = ScriptedEscrow(self.clock)
        self.provider = ScriptedProvider(self.clock, settle_at_escrow=self.escrow.settle)
        self.inner = httpx.MockTransport(lambda request: self.provider(request))
        self.connect()

    def connect(self, limits: Limits = LIMITS, **settings: Any) -> None:
        """Starts over with a new wallet."""
        self.wallet = ScriptedWallet(self.escrow, limits=limits, clock=self.clock, **settings)
        if self.kind == "async":
            self.transport: Any = PaymentTransport(self.wallet, self.inner)
            self.http: Any = httpx.AsyncClient(transport=self.transport, follow_redirects=True)
        else:
            self.transport = SyncPaymentTransport(self.wallet, self.inner)
            self.http = httpx.Client(transport=self.transport, follow_redirects=True)

    async def send(self, method: str, path: str, **more: Any) -> httpx.Response:
        """One call of the caller."""
        url = path if "://" in path else ORIGIN + path
        answer = self.http.request(method, url, **more)
        return await answer if self.kind == "async" else answer

    async def get(self, path: str, **more: Any) -> httpx.Response:
        """One GET."""
        return await self.send("GET", path, **more)

    async def resume(self, handle: Any) -> httpx.Response:
        """Resumes a payment."""
        if self.kind == "async":
            return await handle.resume(self.transport)
        return handle.resume_sync(self.transport)

    async def close(self) -> None:
        """Closes the client, which closes the wallet's sessions."""
        if self.kind == "async":
            await self.http.aclose()
        else:
            self.http.close()

    @property
    def session(self) -> Any:
        """The newest session of the wallet."""
        self.wallet.state.purse.look()
        return list(self.wallet.state.purse.sessions.values())[-1]

    @property
    def signed(self) -> list[httpx.Request]:
        """The requests for goods that carried a payment."""
        return [
            request
            for request in self.provider.requests
            if "PAYMENT-SIGNATURE" in request.headers and request.url.path != p.QUOTE.control
        ]

    def money(self) -> tuple[int, int]:
        """What was paid and what is held, in atomic units."""
        self.wallet.state.purse.look()
        sessions = self.wallet.state.purse.sessions.values()
        return sum(s.charged for s in sessions), sum(s.held for s in sessions)


async def many(world: World, paths: list[str]) -> list[httpx.Response]:
    """Calls all paths at once, in tasks or in threads."""
    if world.kind == "async":
        return list(await asyncio.gather(*(world.get(path) for path in paths)))
    with ThreadPoolExecutor(len(paths)) as pool:
        return list(pool.map(lambda path: world.http.get(ORIGIN + path), paths))

"""A buyer, a provider and an escrow on a real socket, ready to trade."""

import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.escrow.contract import conforms
from tests.support.escrow import (
    RECEIPT_KEY,
    ROOT_SEED,
    SESSION_KEY,
    SESSION_SEED,
    Agent,
    EscrowProcess,
    running_escrow,
)
from x402mw.core import ids
from x402mw.core.amounts import Atomic, to_atomic
from x402mw.core.keys import secret_key
from x402mw.core.strict import b64url_decode
from x402mw.core.tokens import KeySet, SessionToken, open_key_set, open_session_token
from x402mw.core.vouchers import Voucher, network_id, sign_voucher
from x402mw.escrow import agents
from x402mw.escrow.ledger import visit_ledger
from x402mw.escrow.settings import NETWORK, Settings

JOURNAL = "jr_" + "1" * 32


def make_voucher(
    network: bytes, escrow_id: str, cumulative: str, *, seed: bytes = SESSION_SEED
) -> str:
    """A voucher in its wire form, for a total in display units."""
    voucher = Voucher(
        network=network,
        session=ids.parse_id(ids.ESCROW, escrow_id),
        seq=secrets.randbits(63),
        cumulative=Atomic(to_atomic(cumulative)),
        request_hash=bytes(32),
    )
    return sign_voucher(voucher, secret_key(seed)).wire


@dataclass
class Market:
    """The parties, and the requests they send. The escrow runs here or in its own process."""

    escrow: Any
    http: httpx.AsyncClient
    buyer: Agent
    provider: Agent
    journal: str = JOURNAL

    @property
    def network(self) -> bytes:
        """The network id that vouchers are bound to."""
        return network_id(NETWORK, b64url_decode(self.escrow.root_key, 32))

    def voucher(self, escrow_id: str, cumulative: str, *, seed: bytes = SESSION_SEED) -> str:
        """A voucher of the buyer's session key."""
        return make_voucher(self.network, escrow_id, cumulative, seed=seed)

    async def post(
        self, agent: Agent | None, path: str, body: Any = None, *, key: str | None = None
    ) -> httpx.Response:
        """Sends one POST as an agent."""
        headers = dict(agent.headers) if agent else {}
        if key is not None:
            headers["Idempotency-Key"] = key
        return await self.http.post(path, json=body, headers=headers)

    async def get(self, agent: Agent | None, path: str, **query: Any) -> httpx.Response:
        """Sends one GET as an agent."""
        return await self.http.get(path, params=query, headers=agent.headers if agent else {})

    async def balance(self, agent: Agent) -> str:
        """What the agent's account holds."""
        return str((await self.get(agent, "/agents/me")).json()["balance"])

    def wish(self, amount: str = "5.00", **changes: Any) -> dict[str, Any]:
        """The body that opens a session."""
        return {
            "to_agent_id": self.provider.agent_id,
            "amount": amount,
            "session_key": SESSION_KEY,
            "journal": self.journal,
            **changes,
        }

    async def open(self, amount: str = "5.00", **changes: Any) -> dict[str, Any]:
        """Opens a session and returns the escrow with its token."""
        answer = await self.post(self.buyer, "/escrow", self.wish(amount, **changes))
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    async def redeem(
        self, *items: dict[str, Any], serial: int = 1, agent: Agent | None = None
    ) -> list[dict[str, Any]]:
        """Redeems as the provider and returns the verdicts."""
        body = {"journal": self.journal, "serial": serial, "items": list(items)}
        answer = await self.post(agent or self.provider, "/redeem", body)
        assert answer.status_code == 200, answer.text
        return list(answer.json()["items"])

    async def show(self, escrow_id: str) -> dict[str, Any]:
        """The escrow as its buyer sees it."""
        answer = await self.get(self.buyer, f"/escrow/{escrow_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def key_set(self) -> KeySet:
        """The key set as everyone may fetch it, checked under the root key."""
        answer = (await self.http.get(f"{self.escrow.url}/.well-known/x402mw-keys")).json()
        return open_key_set(answer["key_set"], b64url_decode(self.escrow.root_key, 32))

    async def open_token(self, text: str) -> SessionToken:
        """A token, checked as a provider does."""
        return open_session_token(text, await self.key_set())


@asynccontextmanager
async def market(
    place: Path | str, *, balance: str = "100.00", **settings: Any
) -> AsyncIterator[Market]:
    """Runs an escrow in a folder or on a URL, with a funded buyer and a provider with a journal."""
    async with running_escrow(place, **settings) as escrow, client_of(escrow.url) as http:
        buyer, provider = await _register(http, "buyer"), await _register(http, "provider")
        await escrow.deposit(buyer.agent_id, balance)
        yield await _with_journal(Market(escrow, http, buyer, provider))


@asynccontextmanager
async def joined(process: EscrowProcess, *, balance: str = "100.00") -> AsyncIterator[Market]:
    """The same at an escrow process; the operator's deposit is made beside it."""
    async with client_of(process.url) as http:
        buyer, provider = await _register(http, "buyer"), await _register(http, "provider")
        operator = visit_ledger(Settings(process.db, ROOT_SEED), time.time)
        async with operator as ledger, ledger.write() as tx:
            await agents.deposit(tx, buyer.agent_id, to_atomic(balance))
        journal = "jr_" + secrets.token_hex(16)
        yield await _with_journal(Market(process, http, buyer, provider, journal))


def client_of(url: str) -> httpx.AsyncClient:
    """A client of the API below its base path."""
    limits = httpx.Limits(max_connections=100)
    # Plain HTTP needs no certificates, and reading them costs more than a test.
    return httpx.AsyncClient(
        base_url=f"{url}/api/v1",
        timeout=30,
        limits=limits,
        verify=False,
        event_hooks={"response": [conforms]},
    )


async def _register(http: httpx.AsyncClient, name: str) -> Agent:
    body = (await http.post("/agents", json={"name": name})).json()
    return Agent(body["agent_id"], body["api_key"])


async def _with_journal(m: Market) -> Market:
    answer = await m.http.put(
        f"/journals/{m.journal}", json={"receipt_key": RECEIPT_KEY}, headers=m.provider.headers
    )
    assert answer.status_code == 200, answer.text
    return m


def code_of(answer: httpx.Response) -> tuple[int, str]:
    """Status and code of a refusal, once its form is right."""
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["status"] == answer.status_code
    assert problem["type"] == f"urn:x402mw:problem:{problem['code']}"
    assert {"title", "detail"} <= problem.keys()
    return answer.status_code, problem["code"]

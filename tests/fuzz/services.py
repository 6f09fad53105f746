"""Whole services under fuzz: the escrow's API and the provider's middleware, on real SQLite.

Each lives on through many inputs and is begun anew now and then; what it was fed since then is
`history`, so that a failure can be replayed. The rules: no answer of 500 or more, what was refused
has changed nothing, the books balance, and no priced handler runs unpaid.
"""

import asyncio
import atexit
import json
import shutil
import sqlite3
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from tests.escrow.market import JOURNAL, RECEIPT_KEY, Market, make_voucher
from tests.support import asgi
from tests.support.escrow import ROOT_SEED, Agent, MovingClock, RunningEscrow
from tests.support.provider import Shop, selling
from x402mw.core.strict import dumps
from x402mw.escrow.app import create_app
from x402mw.escrow.settings import Settings
from x402mw.provider import PerCall, PerUnit

RESET_INPUTS = 200
AUDIT_INPUTS = 10
STATE = ("accounts", "entries", "postings", "escrows", "agents", "journals", "faucet_claims")
REFUSED_LATER = {"unknown_key"}
"""The one reason for a 503 that junk can cause: a key that a newer key set might have."""
FUNDS = "100000.00"
OWN_ROOT = "/api"


class Service:
    """What both have in common: a loop, a folder, and a life of some inputs."""

    def __init__(self) -> None:
        self.history: list[bytes] = []
        self._runner = asyncio.Runner()
        self._stack = AsyncExitStack()
        self._folder = ""
        atexit.register(lambda: shutil.rmtree(self._folder, ignore_errors=True))

    def check(self, data: bytes) -> None:
        """Runs one program; raises if a rule is broken."""
        try:
            steps = json.loads(data)
        except (ValueError, RecursionError):
            return
        if not isinstance(steps, list):
            return
        if not self._folder or len(self.history) >= RESET_INPUTS:
            self.reset()
        self.history.append(data)
        self._runner.run(self._check([one for one in steps if isinstance(one, dict)]))

    def reset(self) -> None:
        """Ends this life and begins the next."""
        self.close()
        self._folder = tempfile.mkdtemp(prefix="x402mw-fuzz-")
        self._runner.run(self._begin(Path(self._folder)))

    def close(self) -> None:
        """Ends this life for good."""
        if self._folder:
            self._runner.run(self._end())
            shutil.rmtree(self._folder, ignore_errors=True)
        self.history, self._folder = [], ""

    async def _end(self) -> None:
        await self._stack.aclose()

    async def _begin(self, folder: Path) -> None:
        raise NotImplementedError

    async def _check(self, steps: list[dict[str, Any]]) -> None:
        raise NotImplementedError


class EscrowService(Service):
    """The escrow's whole app, with a buyer, a provider, a stranger and some sessions."""

    async def _begin(self, folder: Path) -> None:
        self._clock = MovingClock()
        settings = Settings(str(folder / "escrow.db"), ROOT_SEED)
        app = create_app(settings, clock=self._clock)
        self._app = app
        await self._stack.enter_async_context(app.router.lifespan_context(app))
        http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://escrow.example.com/api/v1"
        )
        await self._stack.enter_async_context(http)
        escrow = RunningEscrow("", app.state.ledger, settings, self._clock)
        agents = [await self._register(http, name) for name in ("buyer", "provider", "stranger")]
        self._agents = dict(zip(("buyer", "provider", "stranger"), agents, strict=True))
        await escrow.deposit(agents[0].agent_id, FUNDS)
        self._market = Market(escrow, http, agents[0], agents[1])
        journal, key = f"/journals/{JOURNAL}", {"receipt_key": RECEIPT_KEY}
        (await http.put(journal, json=key, headers=agents[1].headers)).raise_for_status()
        self._session = (await self._market.open("50.00"))["escrow_id"]
        self._books = sqlite3.connect(f"file:{folder / 'escrow.db'}?mode=ro", uri=True)
        self._stack.callback(self._books.close)

    async def _register(self, http: httpx.AsyncClient, name: str) -> Agent:
        body = (await http.post("/agents", json={"name": name})).json()
        return Agent(body["agent_id"], body["api_key"])

    async def _check(self, steps: list[dict[str, Any]]) -> None:
        if self._status() != "active":
            self._session = (await self._market.open("50.00"))["escrow_id"]
        for step in steps[:8]:
            if isinstance(step.get("wait"), int):
                self._clock.advance(min(max(step["wait"], 0), 10_000_000))
                await self._market.escrow.ledger.sweep()
            else:
                await self._step(step)
        if len(self.history) % AUDIT_INPUTS == 0:
            await self._audit()

    async def _end(self) -> None:
        if self.history:
            await self._audit()
        await super()._end()

    async def _audit(self) -> None:
        assert await self._market.escrow.check() == []

    def _status(self) -> str:
        query = "SELECT status FROM escrows WHERE escrow_id = ?"
        return str(self._books.execute(query, (self._session,)).fetchone()[0])

    async def _step(self, step: dict[str, Any]) -> None:
        before = self._state()
        body = step.get("body")
        raw = b"" if body is None else dumps(self._fill(body))
        fields = {"idempotency-key": step.get("key")}
        who = step.get("as")
        agent = self._agents.get(who) if isinstance(who, str) else None
        fields["authorization"] = f"Bearer {agent.api_key}" if agent else who
        headers = [
            (name.encode(), value.encode("latin-1", "replace"))
            for name, value in fields.items()
            if isinstance(value, str)
        ]
        target = (
            f"{self._fill(str(step.get('path', '/')))}?{self._fill(str(step.get('query', '')))}"
        )
        answer = await ask(self._app, str(step.get("method", "GET")), target, headers, body=raw)
        assert 200 <= answer.status < 500, (answer.status, answer.body)
        if answer.status >= 400:
            assert answer.problem["code"]
            assert self._state() == before, answer.body

    def _fill(self, value: Any) -> Any:
        """Puts what this world knows in the place of "$..."."""
        if isinstance(value, dict):
            return {self._fill(key): self._fill(child) for key, child in value.items()}
        if isinstance(value, list):
            return [self._fill(child) for child in value]
        if not isinstance(value, str) or "$" not in value:
            return value
        if value.startswith("$voucher:"):
            return self._voucher(value.partition(":")[2])
        known = {"session": self._session, "journal": JOURNAL}
        known |= {name: agent.agent_id for name, agent in self._agents.items()}
        for name, text in known.items():
            value = value.replace(f"${name}", text)
        return value

    def _voucher(self, amount: str) -> str:
        try:
            return make_voucher(self._market.network, self._session, amount)
        except Exception:
            return f"no voucher of {amount}"

    def _state(self) -> list[Any]:
        return [self._books.execute(f"SELECT * FROM {name}").fetchall() for name in STATE]


class ShopService(Service):
    """The provider's middleware and journal before a small app that counts its own runs."""

    async def _begin(self, folder: Path) -> None:
        self._runs = 0
        app = Starlette(
            routes=[
                Route("/quote/{symbol}", self._quote),
                Route("/summarize", self._summarize, methods=["POST"]),
                Route("/free", self._free),
            ]
        )
        prices = {
            "GET /quote/{symbol}": PerCall("0.001"),
            "POST /summarize": PerUnit("token", "0.002", per=1000, max_units=4000, base="0.0001"),
        }
        self._shop: Shop = await self._stack.enter_async_context(selling(app, prices, folder))

    async def _quote(self, request: Request) -> PlainTextResponse:
        self._runs += 1
        return PlainTextResponse("quote")

    async def _summarize(self, request: Request) -> PlainTextResponse:
        self._runs += 1
        request.state.payment.charge(token=500)
        return PlainTextResponse("summary")

    async def _free(self, request: Request) -> PlainTextResponse:
        return PlainTextResponse("free")

    async def _check(self, steps: list[dict[str, Any]]) -> None:
        for step in steps[:8]:
            await self._step(step)

    async def _step(self, step: dict[str, Any]) -> None:
        before = await self._shop.account()
        serial, runs = self._shop.journal.serial, self._runs
        headers = [*self._headers(step), *self._payment(step)]
        answer = await ask(
            self._shop.app,
            str(step.get("method", "GET")),
            str(step.get("target", "/")),
            headers,
            chunks=step.get("body"),
            root_path=OWN_ROOT if step.get("root") else "",
        )
        if answer.status == 0:
            # Nobody was there to be answered; what ran then was still paid for.
            assert self._runs == runs
            return
        assert answer.status < 500 or answer.problem["code"] in REFUSED_LATER, answer
        after = await self._shop.account()
        ran = self._runs - runs
        paid = answer.paid if answer.header("payment-response") else None
        # With an error reason it tells of another call under the same seq.
        settled = paid is not None and paid["extra"]["state"] == "settled"
        settled = settled and "errorReason" not in paid
        replayed = answer.header("idempotent-replayed") is not None
        assert ran == int(settled and not replayed), answer
        charge = int(paid["amount"]) if paid is not None and ran else 0
        assert after.charged - before.charged == charge
        assert charge > 0 or not ran
        assert after.reserved == 0
        if answer.status >= 400:
            assert self._shop.journal.serial == serial, answer

    def _headers(self, step: dict[str, Any]) -> list[tuple[bytes, bytes]]:
        found = step.get("headers")
        pairs = found if isinstance(found, list) else []
        return [
            (
                str(one[0]).lower().encode("latin-1", "replace"),
                str(one[1]).encode("latin-1", "replace"),
            )
            for one in pairs
            if isinstance(one, list) and len(one) == 2
        ]

    def _payment(self, step: dict[str, Any]) -> list[tuple[bytes, bytes]]:
        """The payment of a step, as far as one can be signed from what it says."""
        wish = step.get("pay")
        if not isinstance(wish, dict):
            return []
        wish = {**wish}
        try:
            if "control" in wish:
                one = self._shop.control(str(wish.pop("control")).encode(), **wish)
            else:
                wish["body"] = str(wish.get("body", "")).encode()
                wish.setdefault("method", str(wish.get("route", "GET")).partition(" ")[0])
                one = self._shop.payment(wish.pop("route", "GET /quote/{symbol}"), **wish)
            return [self._shop.header(one)]
        except Exception:
            return []


async def ask(
    app: Any,
    method: str,
    target: str,
    headers: list[tuple[bytes, bytes]],
    *,
    body: bytes = b"",
    chunks: Any = None,
    root_path: str = "",
) -> asgi.Answer:
    """Sends one raw request; a chunk of None is a client that goes away."""
    parts: list[bytes | None] = [body]
    if isinstance(chunks, list):
        parts = [None if one is None else str(one).encode("utf-8", "replace") for one in chunks]
    answer = asgi.Answer()

    async def receive() -> dict[str, Any]:
        part = parts.pop(0) if parts else None
        if part is None:
            parts.clear()
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message: Any) -> None:
        answer.messages.append(message)

    path, _, query = target.encode("utf-8", "replace").decode().partition("?")
    known = {name for name, _ in headers}
    scope = asgi.make_scope(method, "/", headers, host=None if b"host" in known else asgi.HOST)
    scope |= {"path": root_path + unquote(path), "raw_path": (root_path + path).encode()}
    scope |= {"query_string": query.encode(), "root_path": root_path}
    await app(scope, receive, send)
    starts = [one for one in answer.messages if one["type"] == "http.response.start"]
    assert len(starts) <= 1, answer
    return answer

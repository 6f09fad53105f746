"""Parties that cheat: a buyer that signs by hand, and a provider that lies and takes what it can.

Neither may do more harm than we print: the provider serves nothing beyond signed cover, the buyer
loses at most what it has signed and not yet used, and never another session's money.
"""

import asyncio
import base64
import hashlib
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from tests.simulation import escrows, wallets
from tests.simulation.handlers import Work, plan_work
from tests.simulation.loop import Process
from tests.simulation.providers import ProviderParty
from x402mw.core import ids, keys, vouchers
from x402mw.core.amounts import Atomic
from x402mw.core.errors import X402mwError
from x402mw.core.messages import EscrowExtra, PaymentRequirements, validate
from x402mw.core.terms import read_terms
from x402mw_client import operations
from x402mw_client.operations import RedeemItem

DEPOSIT = 1_000_000
REASONS = ("cover", "seq_used", "outcome_gone", "forgotten", "token", "journal_replaced")
ATTACKS = (
    "pay",
    "crowd",
    "replay",
    "other_route",
    "other_body",
    "race_forms",
    "beyond_deposit",
    "odd_expiry",
    "cheap_terms",
    "steal",
    "close_and_spend",
    "break_in",
)


@dataclass
class Loot:
    """One session of the thief."""

    id: bytes
    seed: bytes
    token: str
    pay_to: str
    accepts: dict[str, Any]
    cumulative: int = 0
    headers: list[tuple[str, Work, str]] = field(default_factory=list)


class GreedyBuyer:
    """A buyer that tries to be served for more than it pays."""

    honest = False

    def __init__(self, world: Any, name: str, account: escrows.Account) -> None:
        self.world, self.name, self.account = world, name, account
        self.rng = world.rng
        self.process = Process(world.loop, name)
        self.escrow = wallets.escrow_client(world.network, name, escrows.URL, account.api_key)
        self.sessions: dict[str, Loot] = {}
        self.seen: list[tuple[httpx.Request, str]] = []
        self.calls = 0
        world.network.taps.append(self._listen)

    def _listen(self, here: str, request: httpx.Request) -> None:
        """A thief that also hears what others send."""
        if here != self.name and "PAYMENT-SIGNATURE" in request.headers and len(self.seen) < 300:
            self.seen.append((request, here))

    def start(self) -> None:
        """Goes to work."""
        self.process.spawn(self._steal_forever())

    async def _steal_forever(self) -> None:
        while not self.world.quiet:
            await asyncio.sleep(self.rng.expovariate(1 / self.world.gap))
            attack = self.rng.choice(ATTACKS)
            self.world.operation(f"attack: {attack}", self.name)
            with suppress(X402mwError, httpx.HTTPError, LookupError, ValueError, TypeError):
                provider = self.rng.choice(self.world.providers)
                await getattr(self, f"_{attack}")(provider)

    # Signing by hand.

    async def _session(self, provider: Any) -> Loot:
        """A session with a provider, opened when there is none."""
        found = self.sessions.get(provider.name)
        if found is not None and self.rng.random() < 0.95:
            if self.rng.random() < 0.2:
                record = await self.escrow.renew_token(found.id)
                found.token = record.token or found.token
            return found
        answer = await self._send(provider, Work("GET", "/quote/1"), None)
        required = json.loads(base64.b64decode(answer.headers["PAYMENT-REQUIRED"]))
        accepts = required["accepts"][0]
        seed = self.rng.randbytes(32)
        record = await self.escrow.open_session(
            accepts["payTo"],
            Atomic(DEPOSIT),
            session_key=keys.public_key(seed),
            journal=ids.parse_id(ids.JOURNAL, accepts["extra"]["journal"]),
            expires_in_seconds=self.rng.choice((1800, 86_400)),
        )
        loot = Loot(record.session, seed, record.token or "", accepts["payTo"], accepts)
        self.sessions[provider.name] = loot
        return loot

    async def _offer(self, provider: Any, work: Work) -> dict[str, Any]:
        answer = await self._send(provider, work, None)
        required = json.loads(base64.b64decode(answer.headers["PAYMENT-REQUIRED"]))
        accepts: dict[str, Any] = required["accepts"][0]
        return accepts

    def _header(
        self,
        loot: Loot,
        provider: Any,
        work: Work,
        accepts: dict[str, Any],
        *,
        seq: int | None = None,
        cumulative: int | None = None,
        expires: int = 300,
    ) -> str:
        requirements = validate(PaymentRequirements, accepts)
        extra = validate(EscrowExtra, requirements.extra)
        terms = read_terms(requirements, extra, self._network_id(provider))
        until = int((self.world.escrow.clock() + expires) * 1000)
        bound = vouchers.BoundRequest(
            binding=0,
            method=work.method,
            origin=provider.origin,
            target=work.path,
            body_hash=hashlib.sha256(work.body).digest(),
            amount=terms.amount,
            expires=until,
            terms_id=terms.id,
        )
        if cumulative is None:
            cumulative = loot.cumulative = min(DEPOSIT, loot.cumulative + terms.amount)
        voucher = vouchers.Voucher(
            terms.network_id,
            loot.id,
            self.rng.getrandbits(63) if seq is None else seq,
            Atomic(cumulative),
            vouchers.hash_request(bound),
        )
        signed = vouchers.sign_voucher(voucher, keys.secret_key(loot.seed))
        content = {
            "x402Version": 2,
            "payload": {
                "voucher": signed.wire,
                "token": loot.token,
                "expires": until,
                "binding": 0,
            },
            "accepted": accepts,
        }
        return base64.b64encode(json.dumps(content, separators=(",", ":")).encode()).decode()

    def _network_id(self, provider: Any) -> bytes:
        root = keys.public_key(escrows.ROOT_SEED)
        return vouchers.network_id(self.world.escrow.settings.network, root)

    async def _send(
        self, provider: Any, work: Work, header: str | None, call: str = ""
    ) -> httpx.Response:
        if not call:
            self.calls += 1
            call = f"{self.name}-{self.calls}"
            self.world.works[call] = work
        found = {"x-call": call}
        if header is not None:
            found["PAYMENT-SIGNATURE"] = header
        request = httpx.Request(
            work.method,
            provider.origin + work.path,
            headers=found,
            content=work.body,
            extensions={"timeout": {"read": 20.0}},
        )
        answer: httpx.Response = await self.world.network.send(self.name, request)
        await answer.aread()
        self.world.oracle.count(f"thief told {answer.status_code}")
        return answer

    def _work(self) -> Work:
        work = plan_work(self.rng)
        if work.route == "upload":
            work = Work("GET", "/quote/2")
        return replace(work, delay=min(work.delay, 2.0))

    # What it tries.

    async def _pay(self, provider: Any) -> None:
        loot, work = await self._session(provider), self._work()
        header = self._header(loot, provider, work, await self._offer(provider, work))
        loot.headers.append((header, work, provider.name))
        await self._send(provider, work, header)

    async def _crowd(self, provider: Any) -> None:
        """Many calls at once under cover for one."""
        loot, work = await self._session(provider), Work("GET", "/quote/3")
        accepts = await self._offer(provider, work)
        total = min(DEPOSIT, loot.cumulative + int(accepts["amount"]))
        loot.cumulative = total
        many = [self._header(loot, provider, work, accepts, cumulative=total) for _ in range(6)]
        await self._all(self._send(provider, work, header) for header in many)

    async def _replay(self, provider: Any) -> None:
        loot = await self._session(provider)
        header, work, name = self.rng.choice(loot.headers)
        there = next(one for one in self.world.providers if one.name == name)
        await self._all(self._send(there, work, header) for _ in range(3))

    async def _other_route(self, provider: Any) -> None:
        loot = await self._session(provider)
        header, _, _ = self.rng.choice(loot.headers)
        await self._send(self.rng.choice(self.world.providers), self._work(), header)

    async def _other_body(self, provider: Any) -> None:
        loot, work = await self._session(provider), Work("POST", "/tokens", b"cheap", units=[9])
        header = self._header(loot, provider, work, await self._offer(provider, work))
        await self._send(provider, replace(work, body=b"dear", units=[50_000]), header)

    async def _race_forms(self, provider: Any) -> None:
        """One seq, several vouchers and requests, all at once."""
        loot, seq = await self._session(provider), self.rng.getrandbits(63)
        works = [Work("GET", f"/quote/{number}") for number in range(5)]
        accepts = await self._offer(provider, works[0])
        many = [(work, self._header(loot, provider, work, accepts, seq=seq)) for work in works]
        await self._all(self._send(provider, work, header) for work, header in many)

    async def _beyond_deposit(self, provider: Any) -> None:
        loot, work = await self._session(provider), Work("GET", "/quote/4")
        accepts = await self._offer(provider, work)
        more = DEPOSIT + self.rng.choice((1, DEPOSIT, 2**62))
        await self._send(
            provider, work, self._header(loot, provider, work, accepts, cumulative=more)
        )

    async def _odd_expiry(self, provider: Any) -> None:
        loot, work = await self._session(provider), Work("GET", "/quote/5")
        accepts = await self._offer(provider, work)
        expires = self.rng.choice((-130, -119, 0, 419, 430, 100_000))
        header = self._header(loot, provider, work, accepts, expires=expires)
        loot.headers.append((header, work, provider.name))
        await self._send(provider, work, header)

    async def _cheap_terms(self, provider: Any) -> None:
        """Terms of its own making, right in themselves."""
        loot, work = await self._session(provider), Work("GET", "/quote/6")
        accepts = json.loads(json.dumps(await self._offer(provider, work)))
        accepts["amount"] = self.rng.choice(("1", "0", "9999"))
        requirements = validate(PaymentRequirements, accepts)
        extra = validate(EscrowExtra, requirements.extra)
        with suppress(X402mwError):
            read_terms(requirements, extra, self._network_id(provider))
        await self._send(provider, work, self._header(loot, provider, work, accepts))

    async def _steal(self, _provider: Any) -> None:
        """What another buyer has sent, sent again."""
        request, _ = self.rng.choice(self.seen)
        body = b"".join([part async for part in request.stream])
        again = httpx.Request(request.method, request.url, headers=request.headers, content=body)
        answer = await self.world.network.send(self.name, again)
        await answer.aread()

    async def _close_and_spend(self, provider: Any) -> None:
        """Closes at the escrow, and goes on spending with the old token."""
        loot, work = await self._session(provider), Work("GET", "/quote/7")
        header = self._header(loot, provider, work, await self._offer(provider, work))
        if self.rng.random() < 0.3:
            del self.sessions[provider.name]
            await self._all([self.escrow.close(loot.id), self._send(provider, work, header)])
        for _ in range(3):
            await self._pay(provider)

    async def _break_in(self, provider: Any) -> None:
        """Operations on what belongs to others."""
        loot = await self._session(provider)
        others = escrows.read_books(self.world.escrow.path).escrows
        name = self.rng.choice(list(others))
        victim = ids.parse_id(ids.ESCROW, name)
        journal = ids.parse_id(ids.JOURNAL, loot.accepts["extra"]["journal"])
        tries: list[Callable[[], Any]] = [
            lambda: self.escrow.close(victim),
            lambda: self.escrow.renew_token(victim),
            lambda: self.escrow.topup(victim, Atomic(10)),
            lambda: self.escrow.release(victim, cumulative=Atomic(DEPOSIT)),
            lambda: self.escrow.register_journal(journal, keys.public_key(loot.seed)),
            lambda: self.escrow.redeem(journal, 1, [RedeemItem(Atomic(5), session=victim)]),
            lambda: self.escrow.changes(0, journal, 2**62),
            lambda: self.escrow.topup(loot.id, Atomic(2**62)),
        ]
        number = self.rng.randrange(len(tries))
        if number == 3 and others[name].buyer == self.account.agent_id:
            # One of its own, perhaps unknown to it: the answer to its opening was lost.
            self.world.oracle.by_hand[name] = DEPOSIT
        await tries[number]()

    async def _all(self, many: Any) -> None:
        await asyncio.gather(*many, return_exceptions=True)


class GreedyProvider(ProviderParty):
    """A provider with an honest shop and a lying door, which also redeems what it did not earn."""

    honest = False

    def __init__(self, world: Any, name: str, account: escrows.Account, folder: Path) -> None:
        super().__init__(world, name, account, folder)
        self.robber = Process(world.loop, name)
        self.escrow = wallets.escrow_client(world.network, name, escrows.URL, account.api_key)
        self.heard: list[bytes] = []
        world.network.taps.append(self._listen)

    def start(self) -> None:
        """Starts, and goes to rob."""
        super().start()
        self.robber.spawn(self._rob_forever())

    def _listen(self, _here: str, request: httpx.Request) -> None:
        with suppress(KeyError, ValueError, TypeError):
            content = json.loads(base64.b64decode(request.headers["PAYMENT-SIGNATURE"]))
            text = content["payload"]["voucher"]
            self.heard.append(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))

    async def _rob_forever(self) -> None:
        while not self.world.over:
            await asyncio.sleep(self.world.rng.uniform(10, 60))
            if not self.world.quiet:
                self.world.operation("robbery", self.name)
            with suppress(X402mwError, sqlite3.Error):
                await self._rob()

    async def _rob(self) -> None:
        """Presents vouchers for all they are good for: newest, old, and other providers'."""
        rng = self.world.rng
        with closing(sqlite3.connect(self.path)) as connection:
            query = "SELECT id FROM journals WHERE replaced = 0"
            (journal,) = connection.execute(query).fetchone()
            best = [row[0] for row in connection.execute("SELECT voucher FROM sessions")]
        found = [*best, *rng.sample(self.heard, min(5, len(self.heard)))]
        items = [
            RedeemItem(
                Atomic(rng.choice((2**62, 10**6, int.from_bytes(voucher[72:80], "big")))),
                voucher=voucher,
                final=rng.random() < 0.05,
            )
            for voucher in found
            if voucher is not None
        ]
        if items:
            answer = await self.escrow.run(operations.redeem(journal, rng.randrange(9), items))
            for item in answer.items:
                self.world.oracle.count(f"robbery: {item.code or 'paid'}")

    def disguise(self, app: Any) -> Any:
        """Lies in the headers of some answers."""

        async def door(scope: Any, receive: Any, send: Any) -> None:
            async def lie(message: Any) -> None:
                if message["type"] == "http.response.start" and self.world.rng.random() < 0.15:
                    self.world.oracle.count("lies told")
                    found = [self._twist(*field) for field in message["headers"]]
                    message = {**message, "headers": [field for field in found if field]}
                await send(message)

            await app(scope, receive, lie)

        return door

    def _twist(self, name: bytes, value: bytes) -> tuple[bytes, bytes] | None:
        rng = self.world.rng
        if name not in (b"payment-response", b"payment-required"):
            return name, value
        if rng.random() < 0.1:
            return None
        content = json.loads(base64.b64decode(value))
        twist = self._twist_terms if name == b"payment-required" else self._twist_word
        twist(content)
        return name, base64.b64encode(json.dumps(content).encode())

    def _twist_terms(self, content: Any) -> None:
        rng, offer = self.world.rng, content["accepts"][0]
        if rng.random() < 0.5:
            offer["amount"] = str(int(offer["amount"]) * rng.choice((2, 1000)))
        else:
            offer["extra"]["suggestedDeposit"] = "900000000"

    def _twist_word(self, content: Any) -> None:
        rng, extra = self.world.rng, content["extra"]
        kind = rng.randrange(7)
        if kind == 0:
            content["amount"] = str(rng.choice((0, 10_000, 40_000, 10**9)))
        elif kind == 1:
            extra["chargedTotal"] = str(rng.choice((0, 10**6, 10**15)))
        elif kind == 2:
            extra["state"] = rng.choice(("settled", "refused", "running", "open"))
        elif kind == 3:
            content["errorReason"] = "invalid_batch_settlement_escrow_" + rng.choice(REASONS)
        elif kind == 4:
            extra["final"] = not extra.get("final")
        elif kind == 5:
            content["transaction"] = rng.randbytes(32).hex()
        elif self.heard:
            voucher = base64.urlsafe_b64encode(rng.choice(self.heard))
            extra["voucher"] = voucher.rstrip(b"=").decode()

"""What is measured in one process, by calling the app directly: no sockets, no server.

Memory per session that is kept in mind, the price of a streamed chunk, and the CPU that a request
can cost before its voucher's signature has verified.
"""

import asyncio
import base64
import contextlib
import gc
import json
import os
import statistics
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

from starlette.types import ASGIApp, Message, Scope

from bench import handlers, serve
from bench.market import Buyer, Market
from x402mw.core import keys, tokens
from x402mw.provider import link

Headers = list[tuple[bytes, bytes]]
HOST = b"127.0.0.1:8402"


def scope_of(target: str, headers: Headers, method: str = "GET") -> Scope:
    """An HTTP scope as a server makes it."""
    path, _, query = target.partition("?")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(b"host", HOST), *headers],
        "server": ("127.0.0.1", 8402),
        "client": ("127.0.0.1", 4242),
        "state": {},
    }


async def call(app: ASGIApp, scope: Scope) -> int:
    """Sends one request and returns the status."""
    status, given = 0, False

    async def receive() -> Message:
        nonlocal given
        if given:
            # The buyer stays until the end of the answer.
            await asyncio.Event().wait()
        given = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)

    await app(scope, receive, send)
    return status


@contextlib.asynccontextmanager
async def shop(market: Market, name: str) -> AsyncIterator[ASGIApp]:
    """Our middleware in this process, started and stopped through its lifespan."""
    os.environ[serve.SETTINGS] = json.dumps(market.provider(name))
    app = serve.ours("process")
    inbox: asyncio.Queue[Message] = asyncio.Queue()
    started, stopped = asyncio.Event(), asyncio.Event()

    async def send(message: Message) -> None:
        if message["type"].startswith("lifespan.startup"):
            started.set()
        else:
            stopped.set()

    life = asyncio.create_task(app({"type": "lifespan", "state": {}}, inbox.get, send))
    await inbox.put({"type": "lifespan.startup"})
    await started.wait()
    try:
        yield app
    finally:
        await inbox.put({"type": "lifespan.shutdown"})
        await stopped.wait()
        await life


class InsideBuyer(Buyer):
    """A buyer that reads its offers by calling the app."""

    app: ASGIApp

    def __init__(self, market: Market, app: ASGIApp, offers: dict[str, Any]) -> None:
        self._known = offers
        super().__init__(market, market.account("1000"), f"http://{HOST.decode()}", sessions=4)

    def offer(self, target: str) -> dict[str, Any]:
        """The offer that was read before."""
        found: dict[str, Any] = self._known[target]
        return found


async def read_offers(app: ASGIApp, *targets: str) -> dict[str, Any]:
    """Asks for terms, as `Buyer` does over HTTP."""
    found = {}
    for target in targets:
        headers: Headers = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message, headers: Headers = headers) -> None:
            headers.extend(message.get("headers", ()))

        await app(scope_of(target, []), receive, send)
        content = json.loads(base64.b64decode(dict(headers)[b"payment-required"]))
        found[target] = content["accepts"][0]
    return found


# A streamed chunk.


async def streaming(market: Market, *, rounds: int, chunks: int) -> dict[str, float]:
    """Microseconds per chunk, bare and metered."""
    few, many = f"/stream?chunks={chunks // 10}", f"/stream?chunks={chunks}"
    async with shop(market, "streaming") as ours:
        buyer = InsideBuyer(market, ours, await read_offers(ours, "/item", few, many))
        bare = handlers.bare()
        found: dict[str, list[float]] = {"bare": [], "ours": []}
        for number in range(rounds + 1):
            plain = await _chunk_us(bare, lambda target: [], few, many, chunks)
            paid = await _chunk_us(ours, _payer(buyer), few, many, chunks)
            if number:
                found["bare"].append(plain)
                found["ours"].append(paid)
        buyer.close()
    ratios = [one / base for one, base in zip(found["ours"], found["bare"], strict=True)]
    return {
        "bare_us": statistics.median(found["bare"]),
        "ours_us": statistics.median(found["ours"]),
        "ratio": statistics.median(ratios),
    }


def _payer(buyer: Buyer) -> Callable[[str], Headers]:
    return lambda target: [(b"payment-signature", buyer.payments(target, 1)[0])]


async def _chunk_us(
    app: ASGIApp, pay: Callable[[str], Headers], few: str, many: str, chunks: int
) -> float:
    """The slope between a short and a long stream: what one more chunk costs."""
    short = await _timed(call(app, scope_of(few, pay(few))))
    long = await _timed(call(app, scope_of(many, pay(many))))
    return 1e6 * (long - short) / (chunks - chunks // 10)


async def _timed(calling: Awaitable[int]) -> float:
    gc.disable()
    began = time.process_time()
    status = await calling
    took = time.process_time() - began
    gc.enable()
    if status != 200:
        raise RuntimeError(f"a stream was answered {status}")
    return took


# Memory.


def memory(*, sessions: int) -> dict[str, float]:
    """Bytes that a provider keeps in mind for each idle session, its verified token above all."""
    seed = bytes(range(32))
    key = keys.public_key(seed)
    key_set = tokens.KeySet(
        network="escrow:bench",
        serial=1,
        not_after=2**40,
        keys={tokens.key_id(key): key},
        retired=frozenset(),
        min_escrow=tokens.Atomic(10_000),
        claim_seconds=300,
    )
    known = link.EscrowLink.__new__(link.EscrowLink)
    known.__init__(None, None)  # type: ignore[misc,arg-type] # only its cache of tokens is used
    known.key_set = key_set
    texts = list(_tokens(key, seed, sessions))
    most, link.TOKENS_CACHED_MAX = link.TOKENS_CACHED_MAX, 2 * sessions + 2
    gc.collect()
    tracemalloc.start()
    for text in texts:
        known.open_token(text)
    gc.collect()
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    link.TOKENS_CACHED_MAX = most
    return {"sessions": sessions, "bytes": used / sessions}


def _tokens(key: bytes, seed: bytes, count: int) -> Iterator[str]:
    token = tokens.SessionToken(
        network="escrow:bench",
        session=bytes(16),
        pay_to="ag_" + "0a" * 16,
        journal=bytes(range(16)),
        session_key=key,
        receipt_key=key,
        payer="ag_" + "0b" * 16,
        asset="USDC",
        deposit=tokens.Atomic(1_000_000),
        released=tokens.Atomic(0),
        exp=2**31,
        claim_until=2**31 + 300,
    )
    for _ in range(count):
        mine = replace(
            token,
            session=os.urandom(16),
            payer="ag_" + os.urandom(16).hex(),
            session_key=keys.public_key(os.urandom(32)),
            deposit=tokens.Atomic(1_000_000 + int.from_bytes(os.urandom(3), "big")),
        )
        yield tokens.sign_session_token(mine, seed)


# Before the signature.


async def unverified(market: Market, *, rounds: int) -> dict[str, Any]:
    """Milliseconds of CPU for requests that are refused by their voucher's signature or before."""
    async with shop(market, "unverified") as app:
        buyer = InsideBuyer(market, app, await read_offers(app, "/item"))
        found = {}
        for name, make in _nasty(buyer).items():
            times = []
            for _ in range(rounds):
                scope = make()
                began = time.process_time_ns()
                status = await call(app, scope)
                times.append((time.process_time_ns() - began) / 1e6)
                if status < 400:
                    raise RuntimeError(f"{name} was answered {status}")
            found[name] = {"ms": statistics.median(times), "status": status}
        buyer.close()
    worst = max(found, key=lambda name: found[name]["ms"])
    return {"worst": worst, "worst_ms": found[worst]["ms"], "cases": found}


def _nasty(buyer: Buyer) -> dict[str, Callable[[], Scope]]:
    """Requests that make the provider work before it knows whose they are."""

    def paid(value: bytes, target: str = "/item") -> Scope:
        return scope_of(target, [(b"payment-signature", value)])

    def changed(change: Callable[[dict[str, Any]], None]) -> Scope:
        content = json.loads(base64.b64decode(buyer.payments("/item", 1, spoil=True)[0]))
        change(content)
        return paid(_fitting(json.dumps(content, separators=(",", ":")).encode()))

    def unknown_token(content: dict[str, Any]) -> None:
        head, claims, _ = content["payload"]["token"].split(".")
        wrong = base64.urlsafe_b64encode(os.urandom(64)).rstrip(b"=").decode()
        content["payload"]["token"] = f"{head}.{claims}.{wrong}"

    def many_keys(content: dict[str, Any]) -> None:
        content["accepted"]["extra"] |= {f"k{number}": number for number in range(110)}

    return {
        "wrong signature": lambda: paid(buyer.payments("/item", 1, spoil=True)[0]),
        "unknown token": lambda: changed(unknown_token),
        "foreign terms with many keys": lambda: changed(many_keys),
        "4 KiB of brackets": lambda: paid(base64.b64encode(b"[" * 3000)),
        "4 KiB of small objects": lambda: paid(
            base64.b64encode(
                b'{"x402Version":2,"payload":{},"accepted":{"a":[' + b"{}," * 980 + b"{}]}}"
            )
        ),
        "4 KiB of escapes": lambda: paid(base64.b64encode(b'{"a":"' + b"\\ud800" * 500 + b'"}')),
        "4 KiB of numbers": lambda: paid(base64.b64encode(b"[" + b"1.5e9," * 500 + b"1]")),
        "one long number": lambda: paid(base64.b64encode(b"[" + b"9" * 3000 + b"]")),
        "a long path": lambda: scope_of("/" + "%2e/" * 500 + "item", []),
        "60 KiB of path": lambda: scope_of("/item/" + "a/../" * 12_000, []),
        "64 KiB of payment header": lambda: paid(b"A" * 65_536),
        "100 payment headers": lambda: scope_of(
            "/item", [(b"payment-signature", b"A" * 600)] * 100
        ),
    }


def _fitting(raw: bytes) -> bytes:
    value = base64.b64encode(raw)
    if len(value) > 4096:
        raise RuntimeError("the case is too long for the header: it would be refused by its length")
    return value

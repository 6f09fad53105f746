"""What a paid call costs the buyer: CPU per call against bare httpx, answers canned in memory.

The answers were recorded from the real servers. The time spent in the canned transport itself is
taken out of every figure, so that only the client is measured.
"""

import asyncio
import base64
import contextlib
import gc
import json
import statistics
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx

from bench.market import Account, Market
from bench.processes import Process
from bench.servers import Servers
from x402mw.core.strict import dumps
from x402mw.core.vouchers import parse_voucher
from x402mw_client import Limits, PaymentTransport, Wallet

Reply = Callable[[httpx.Request], httpx.Response]
AMOUNT = 100


class Canned(httpx.AsyncBaseTransport):
    """Answers from memory, counting its own time and the exchanges."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self.seconds = 0.0
        self.exchanges = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Answers at once."""
        began = time.thread_time()
        self.exchanges += 1
        response = self._reply(request)
        self.seconds += time.thread_time() - began
        return response


def _answer(recorded: httpx.Response, **changed: str) -> httpx.Response:
    """A recorded answer again, some of its fields changed."""
    fields = {
        **recorded.headers,
        **{key.replace("_", "-"): value for key, value in changed.items()},
    }
    return httpx.Response(recorded.status_code, headers=fields, content=recorded.content)


def _decoded(value: str) -> Any:
    return json.loads(base64.b64decode(value))


def _encoded(content: Any) -> str:
    return base64.b64encode(dumps(content)).decode()


def bare_reply(shop: Process) -> Reply:
    """The app's answer."""
    recorded = httpx.get(f"{shop.url}/item")
    return lambda request: _answer(recorded)


def our_reply(shop: Process) -> Reply:
    """Terms without a payment; with one, the answer and an account that adds up."""
    terms = httpx.get(f"{shop.url}/item")
    offer = _decoded(terms.headers["payment-required"])["accepts"][0]
    body = b'{"symbol":"BTC","price":"97250.10","currency":"USD"}'
    totals: dict[bytes, int] = {}

    def reply(request: httpx.Request) -> httpx.Response:
        value = request.headers.get("payment-signature")
        if value is None:
            return _answer(terms)
        signed = parse_voucher(_decoded(value)["payload"]["voucher"])
        session = signed.voucher.session
        totals[session] = totals.get(session, 0) + int(offer["amount"])
        paid = {
            "success": True,
            "transaction": signed.commitment_id,
            "network": offer["network"],
            "amount": offer["amount"],
            "extra": {
                "seq": str(signed.voucher.seq),
                "state": "settled",
                "final": True,
                "chargedTotal": str(totals[session]),
                "openTotal": "0",
            },
            "payer": "ag_" + "0b" * 16,
        }
        fields = {
            "content-type": "application/json",
            "cache-control": "private",
            "payment-response": _encoded(paid),
        }
        return httpx.Response(200, headers=fields, content=body)

    return reply


@contextlib.asynccontextmanager
async def our_client(
    market: Market, account: Account, canned: Canned
) -> AsyncIterator[httpx.AsyncClient]:
    """A client with our transport, its wallet in memory."""
    wallet = Wallet(
        escrow=market.escrow.url,
        api_key=account.api_key,
        limits=Limits(per_request="0.01", total="1000.00"),
        deposit="50.00",
    )
    transport = PaymentTransport(wallet, canned, keep_sessions=True)
    async with httpx.AsyncClient(transport=transport) as http:
        yield http


async def _time_calls(http: httpx.AsyncClient, canned: Canned, url: str, count: int) -> float:
    """Microseconds per call, without the canned transport's own."""
    canned.seconds, canned.exchanges = 0.0, 0
    gc.collect()
    gc.disable()
    began = time.thread_time()
    for _ in range(count):
        answer = await http.get(url)
        if answer.status_code != 200:
            raise RuntimeError(f"{url}: {answer.status_code} {answer.text[:200]}")
    took = time.thread_time() - began - canned.seconds
    gc.enable()
    return 1e6 * took / count


async def _measure(clients: dict[str, Any], rounds: int, count: int) -> dict[str, Any]:
    found: dict[str, list[float]] = {name: [] for name in clients}
    exchanges: dict[str, float] = {}
    async with contextlib.AsyncExitStack() as stack:
        opened = {
            name: (await stack.enter_async_context(manager), canned, url)
            for name, (manager, canned, url) in clients.items()
        }
        for number in range(rounds + 1):
            for name, (http, canned, url) in opened.items():
                micros = await _time_calls(http, canned, url, count if number else 20)
                if number:
                    found[name].append(micros)
                    exchanges[name] = canned.exchanges / count
    return {
        name: {
            "us": statistics.median(micros),
            "ratio": statistics.median(
                one / base for one, base in zip(micros, found["bare"], strict=True)
            ),
            "exchanges": exchanges[name],
        }
        for name, micros in found.items()
    }


def measure(market: Market, servers: Servers, *, rounds: int, count: int) -> dict[str, Any]:
    """All clients in interleaved rounds; `servers` are those whose answers are recorded."""
    shop, sold = servers.running["bare"], servers.running["ours-fsync"]
    bare, ours = Canned(bare_reply(shop)), Canned(our_reply(sold))
    account = market.account("1000")
    clients: dict[str, Any] = {
        "bare": (httpx.AsyncClient(transport=bare), bare, f"{shop.url}/item"),
        "ours": (our_client(market, account, ours), ours, f"{sold.url}/item"),
    }
    if "x402-exact" in servers.running:
        from bench import peer_clients

        clients |= peer_clients.clients(servers)
    return asyncio.run(_measure(clients, rounds, count))

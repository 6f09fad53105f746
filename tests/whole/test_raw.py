"""Raw bytes at a real socket: nothing a proxy or an attacker may send runs a priced handler."""

import asyncio
import itertools
from pathlib import Path

import httpx
import pytest

from tests.support.escrow import MovingClock, running_escrow
from tests.support.serving import serving
from tests.whole.test_wire import Till, make_provider

pytestmark = [pytest.mark.anyio, pytest.mark.whole]

TARGETS = [
    *("/item", "/item/", "//item", "/ITEM", "/Item", "/item//", "/./item", "/item/.", "/x/../item"),
    *(
        "/%69tem",
        "/%2569tem",
        "/item%2f",
        "/item%2F",
        "/%2fitem",
        "/item%00",
        "/item%0a",
        "/item%20",
    ),
    *("/item;v=1", "/item?", "/item?a", "/item#x", "/item%23", "/item%3f", "/item\\", "/\\item"),
    *("/item%5c", "/.%2e/item", "/%2e%2e/item", "/item/..;/item", "/item%c0%af", "/item%ff"),
    *("http://127.0.0.1/item", "http://evil.example/item", "https://127.0.0.1:1/item", "*", "item"),
    *("/dear", "/dear/", "/DEAR", "/dea%72", "/item/../dear", "/it%65m", "/\u0131tem", "/item\x7f"),
]
METHODS = ["GET", "HEAD", "POST", "PUT", "OPTIONS", "TRACE", "get", "Get", "PROPFIND", "QUERY"]
FIELDS = [
    "X-HTTP-Method-Override: OPTIONS",
    "X-Original-URL: /free",
    "X-Rewrite-URL: /free",
    "X-Forwarded-Path: /free",
    "X-Forwarded-Host: evil.example",
    "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    "Transfer-Encoding: chunked",
    "Expect: 100-continue",
    "Range: bytes=0-1",
    "If-None-Match: *",
    "PAYMENT-RESPONSE: e30=",
    "X-PAYMENT: e30=",
]


async def answer_to(port: int, raw: bytes) -> bytes:
    """What the server says to these bytes before it closes, or falls silent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(raw)
    try:
        async with asyncio.timeout(5):
            await writer.drain()
            head = await reader.readline()
    except (TimeoutError, ConnectionError):
        head = b""
    finally:
        writer.transport.abort()
    return head


def request(method: str, target: str, host: str, *fields: str) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", "Connection: close", *fields, "", ""]
    return "\r\n".join(lines).encode("utf-8", "surrogateescape")


async def test_no_spelling_or_method_runs_a_handler_unpaid(tmp_path: Path) -> None:
    """Every spelling, method and header trick at a real socket: never 200, never a run."""
    clock, till = MovingClock(), Till()
    async with running_escrow(tmp_path, clock) as escrow:
        seller = await escrow.new_agent("s")
        app = till.app(make_provider(escrow, seller, tmp_path / "journal.db", clock))
        async with serving(app) as shop:
            port = int(shop.rpartition(":")[2])
            host = f"127.0.0.1:{port}"
            tries = [request(*pair, host) for pair in itertools.product(METHODS, TARGETS)]
            tries += [request("GET", "/item", host, field) for field in FIELDS]
            tries += [request("GET", "/item", other) for other in ("", "evil.example", "127.1")]
            for head in await asyncio.gather(*(answer_to(port, raw) for raw in tries)):
                status = head.split(b" ")[1:2]
                assert status != [b"200"]
                assert not (status and status[0].startswith(b"5")), head
            assert till.runs.total() == 0


@pytest.mark.parametrize("size", [0, 1, 100, 4096, 4097, 20_000])
async def test_junk_in_the_payment_header(tmp_path: Path, size: int) -> None:
    """Payment headers of any bytes and length are 400, or refused by the server; nothing runs."""
    clock, till = MovingClock(), Till()
    async with running_escrow(tmp_path, clock) as escrow, httpx.AsyncClient() as http:
        seller = await escrow.new_agent("s")
        app = till.app(make_provider(escrow, seller, tmp_path / "journal.db", clock))
        async with serving(app) as shop:
            for letter in (b"A", b"=", b"{", b"\xff", b"%"):
                found = {"PAYMENT-SIGNATURE": (letter * size).decode("latin-1").encode("latin-1")}
                answer = await http.get(f"{shop}/item", headers=found)
                assert answer.status_code in (400, 431)
            assert till.runs.total() == 0

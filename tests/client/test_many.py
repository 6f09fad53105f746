"""Very many calls at once on one session: all are served, and none of them costs more for it."""

import asyncio
import os
from pathlib import Path

import httpx
import pytest

from tests.client.scripted import ORIGIN
from tests.client.test_interruptions import nothing_left
from tests.client.world import World
from x402mw_client import Limits, PaymentTransport
from x402mw_client.pools import SmallPools

pytestmark = pytest.mark.anyio

CALLS = 10_000 if os.environ.get("X402MW_LONG") else 1000
LIMITS = Limits(per_request="0.01", total="90.00")


@pytest.mark.parametrize("shared", [False, True], ids=["ram", "file"])
async def test_a_thousand_calls_at_once(
    tmp_path: Path, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are served after one probe, for exactly their price, and only so many at a time."""
    # On a busy machine a thousand requests alone take longer than anybody waits for a probe.
    monkeypatch.setattr("x402mw_client.probing.PROBE_SECONDS", 60.0)
    world = World("async")
    world.escrow.balance = 10**9
    running, most = 0, 0

    async def serve(request: httpx.Request) -> httpx.Response:
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        await asyncio.sleep(0)
        answer = world.provider(request)
        await asyncio.sleep(0)
        running -= 1
        return answer

    world.inner = httpx.MockTransport(serve)
    world.connect(LIMITS, deposit="5.00", **({"path": tmp_path / "w.db"} if shared else {}))
    answers = await asyncio.gather(*(world.get("/item/a") for _ in range(CALLS)))
    assert {answer.status_code for answer in answers} == {200}
    assert (world.provider.ran, world.provider.unpaid) == (CALLS, 1)
    assert world.money() == (1000 * CALLS, 0)
    assert (len(world.escrow.sessions), len(world.signed)) == (1, CALLS)
    assert most <= 50
    assert nothing_left(world)


async def test_only_so_many_at_once() -> None:
    """`calls_at_once` bounds what is on its way, of whatever origin; the others wait."""
    world = World("async")
    running, most = 0, 0

    async def serve(request: httpx.Request) -> httpx.Response:
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        await asyncio.sleep(0)
        running -= 1
        return httpx.Response(200, text="free")

    transport = PaymentTransport(world.wallet, httpx.MockTransport(serve), calls_at_once=7)
    async with httpx.AsyncClient(transport=transport) as http:
        urls = [f"https://{number}.example/" for number in range(60)]
        answers = await asyncio.gather(*map(http.get, urls))
    assert {answer.status_code for answer in answers} == {200}
    assert most == 7


async def test_connections_are_used_again() -> None:
    """One call after another uses one connection; many at once use a few, and then those again."""
    seen: set[object] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.add(writer)
        while line := await reader.readline():
            if line == b"\r\n":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    async with server, httpx.AsyncClient(transport=SmallPools()) as http:
        for _ in range(5):
            assert (await http.get(url)).text == "ok"
        assert len(seen) == 1
        for _ in range(3):
            answers = await asyncio.gather(*(http.get(url) for _ in range(20)))
            assert {answer.text for answer in answers} == {"ok"}
        assert len(seen) == 20
        with pytest.raises(httpx.ConnectError):
            await http.get(ORIGIN)
        transport = http._transport
        assert isinstance(transport, SmallPools)
        assert transport._busy == [0] * 10

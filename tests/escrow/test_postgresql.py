"""The same books on PostgreSQL. Runs where X402MW_TEST_POSTGRESQL names a server's URL.

Such as `postgresql://postgres@127.0.0.1:5432`; each test makes a database there and drops it.
"""

import asyncio
import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.escrow.market import JOURNAL, code_of, joined, market
from tests.support.escrow import EscrowProcess

asyncpg = pytest.importorskip("asyncpg")
SERVER = os.environ.get("X402MW_TEST_POSTGRESQL", "")
pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not SERVER, reason="X402MW_TEST_POSTGRESQL names no server"),
]


@pytest.fixture
async def url() -> AsyncIterator[str]:
    """The URL of an empty database."""
    name = f"x402mw_{secrets.token_hex(8)}"
    admin = await asyncpg.connect(f"{SERVER}/postgres")
    await admin.execute(f"CREATE DATABASE {name}")
    yield f"{SERVER}/{name}"
    await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await admin.close()


async def test_a_trade_with_everything_at_once(tmp_path: Path, url: str) -> None:
    """I1 to I12 on PostgreSQL: many at once, idempotent, refused and redeemed; the books hold."""
    async with market(tmp_path, database_url=url) as m:
        name = (await m.open("5.00"))["escrow_id"]

        async def redeem(number: int) -> int:
            item = {"voucher": m.voucher(name, "50"), "amount": f"{number / 2}"}
            body = {"journal": JOURNAL, "serial": number, "items": [item]}
            return (await m.post(m.provider, "/redeem", body)).status_code

        async def top_up(number: int) -> int:
            path, body = f"/escrow/{name}/topup", {"amount": "0.10"}
            return (await m.post(m.buyer, path, body, key=f"k{number // 2}")).status_code

        work = [*(redeem(number) for number in range(1, 9)), *(top_up(n) for n in range(20))]
        assert set(await asyncio.gather(*work)) <= {200, 409}
        end = await m.show(name)
        assert (end["amount"], end["released"]) == ("6.00", "4.00")
        assert code_of(await m.post(m.buyer, "/escrow", m.wish("95"))) == (
            409,
            "insufficient_funds",
        )


async def test_a_lost_connection_is_a_503(tmp_path: Path, url: str) -> None:
    """Failures: when the server drops us in mid-request the same key works on retry, once."""
    async with market(tmp_path, database_url=url) as m:
        name = (await m.open("5.00"))["escrow_id"]
        admin = await asyncpg.connect(f"{SERVER}/postgres")
        statuses = set()

        async def top_up(number: int) -> None:
            status = 0
            while status != 200:
                path, body = f"/escrow/{name}/topup", {"amount": "0.01"}
                status = (await m.post(m.buyer, path, body, key=f"k{number}")).status_code
                statuses.add(status)

        async def drop() -> None:
            for _ in range(20):
                await admin.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1",
                    url.rpartition("/")[2],
                )

        await asyncio.gather(drop(), *(top_up(number) for number in range(100)))
        await admin.close()
        assert statuses <= {200, 409, 503}
        assert (await m.show(name))["amount"] == "6.00"


async def test_two_services_start_at_once_on_an_empty_database(url: str) -> None:
    """I12: two processes make one schema and one set of books, and serve it together."""
    both = [EscrowProcess(url), EscrowProcess(url)]
    try:
        await asyncio.gather(*(asyncio.to_thread(process.start) for process in both))
        async with joined(both[0]) as m:
            name = (await m.open())["escrow_id"]
            m.http.base_url = f"{both[1].url}/api/v1"
            assert (await m.show(name))["status"] == "locked"
        both[1].check()
        assert [process.terminate() for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()

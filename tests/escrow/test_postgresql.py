"""What can only happen on PostgreSQL: lost connections, conflicts, several services at once."""

import asyncio

import pytest

from tests.escrow.market import joined, market
from tests.support.escrow import EscrowProcess
from tests.support.postgresql import shared_server

pytestmark = pytest.mark.anyio


async def test_a_lost_connection_is_a_503(postgresql: str) -> None:
    """Failures: when the server drops us in mid-request the same key works on retry, once."""
    async with market(postgresql) as m:
        name = (await m.open("5.00"))["escrow_id"]
        statuses = set()

        async def top_up(number: int) -> None:
            status = 0
            while status != 200:
                path, body = f"/escrow/{name}/topup", {"amount": "0.01"}
                status = (await m.post(m.buyer, path, body, key=f"k{number}")).status_code
                statuses.add(status)

        async def drop() -> None:
            for _ in range(20):
                await asyncio.to_thread(shared_server().drop_connections, postgresql)

        await asyncio.gather(drop(), *(top_up(number) for number in range(100)))
        assert statuses <= {200, 409, 503}
        assert (await m.show(name))["amount"] == "6.00"


async def test_two_services_start_at_once_on_an_empty_database(postgresql: str) -> None:
    """I12: two processes make one schema and one set of books, and serve it together."""
    both = [EscrowProcess(postgresql), EscrowProcess(postgresql)]
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

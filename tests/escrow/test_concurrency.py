"""Many at once over real sockets: the money of one session is never promised twice."""

import asyncio
import sqlite3
from decimal import Decimal
from pathlib import Path

import pytest

from tests.escrow.market import JOURNAL, code_of, joined, market
from tests.support.escrow import escrow_process
from x402mw.escrow import database

pytestmark = pytest.mark.anyio


async def test_a_hundred_at_once_never_exceed_the_deposit(db: str) -> None:
    """I12: redeem, release, top up and close at once; R <= L always, and the books balance."""
    async with market(db) as m:
        name = (await m.open("5.00"))["escrow_id"]

        async def redeem(number: int) -> int:
            item = {"voucher": m.voucher(name, "50"), "amount": f"{number / 2}"}
            body = {"journal": JOURNAL, "serial": number, "items": [item]}
            return (await m.post(m.provider, "/redeem", body)).status_code

        async def buyer(path: str, body: dict[str, str] | None) -> int:
            return (await m.post(m.buyer, f"/escrow/{name}/{path}", body)).status_code

        work = [redeem(number) for number in range(1, 41)]
        work += [buyer("release", {"cumulative": f"{number / 3:.6f}"}) for number in range(30)]
        work += [buyer("topup", {"amount": "0.10"}) for _ in range(29)]
        work.insert(80, buyer("close", None))
        statuses = await asyncio.gather(*work)
        assert len(statuses) == 100
        assert set(statuses) <= {200, 409}
        end = await m.show(name)
        assert Decimal(end["released"]) <= Decimal(end["amount"]) <= Decimal("7.90")
        assert await m.escrow.check() == []


async def test_a_balance_is_not_locked_twice(db: str) -> None:
    """I3 and I12: thirty locks of $5 at once from $50 give ten sessions, never an eleventh."""
    async with market(db, balance="50.00") as m:
        answers = await asyncio.gather(
            *(m.post(m.buyer, "/escrow", m.wish("5.00")) for _ in range(30))
        )
        assert sorted(answer.status_code for answer in answers) == [201] * 10 + [409] * 20
        assert await m.balance(m.buyer) == "0.00"


async def test_a_locked_database_is_a_503_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Failures: while the books cannot be written the answer is 503; afterwards it works."""
    monkeypatch.setattr(database, "BUSY_MILLISECONDS", 50)
    async with market(tmp_path) as m:
        stranger = sqlite3.connect(tmp_path / "escrow.db", isolation_level=None)
        stranger.execute("BEGIN IMMEDIATE")
        answer = await m.post(m.buyer, "/escrow", m.wish(), key="k")
        assert code_of(answer) == (503, "unavailable")
        assert "retry-after" in answer.headers
        assert "date" in answer.headers
        assert await m.balance(m.buyer) == "100.00"
        stranger.execute("ROLLBACK")
        stranger.close()
        assert (await m.post(m.buyer, "/escrow", m.wish(), key="k")).status_code == 201


async def test_two_processes_share_one_set_of_books(tmp_path: Path) -> None:
    """I12: two services and the operator's command on one SQLite file make one chain of entries."""
    with escrow_process(tmp_path) as first, escrow_process(tmp_path) as second:
        async with joined(first) as one, joined(second) as two:
            names = [(await m.open("1.00"))["escrow_id"] for m in (one, two)]
            # Each session is now paid out through the other process than the one that opened it.
            one.http.base_url, two.http.base_url = two.http.base_url, one.http.base_url
            answers = await asyncio.gather(
                *(
                    m.post(m.buyer, f"/escrow/{name}/release", {"cumulative": f"0.{cents:02}"})
                    for m, name in zip((one, two), names, strict=True)
                    for cents in range(1, 21)
                )
            )
            assert {answer.status_code for answer in answers} == {200}
            first.deposit(one.buyer.agent_id, "1.00")
            for m, name in zip((one, two), names, strict=True):
                assert (await m.show(name))["released"] == "0.20"
        first.check()

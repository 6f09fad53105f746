"""Many at once over real sockets: the money of one session is never promised twice."""

import asyncio
import os
import sqlite3
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from tests.escrow.market import JOURNAL, Market, client_of, code_of, joined, market
from tests.escrow.test_manual_api import lock
from tests.support.escrow import MovingClock, escrow_process
from tests.support.postgresql import fresh_database
from x402mw.escrow import database, manual, manual_bodies
from x402mw.escrow.ledger import open_ledger
from x402mw.escrow.settings import Settings

pytestmark = pytest.mark.anyio

WRITERS = 64
LONG = bool(os.environ.get("X402MW_LONG"))


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


# Manual escrows: 64 writers at once, as tasks, threads and processes.


async def test_tasks_never_pay_more_than_was_locked(db: str) -> None:
    """I12: of 64 releases of 0.25 at once, 10.00 covers forty, and the others are refused."""
    async with market(db) as m:
        name = await lock(m)
        answers = await asyncio.gather(*(_post(m, name, "release", amount="0.25") for _ in _WORK))
        assert Counter(answers) == {200: 40, 409: 24}
        shown = await m.show(name)
        assert (shown["status"], shown["released"]) == ("released", "10.00")


async def test_everything_at_once_never_pays_more_than_was_locked(db: str) -> None:
    """I12: each success of any kind took its own share; together they are what was locked."""
    async with market(db) as m:
        name = await lock(m)
        kinds: list[tuple[str, dict[str, Any], Fraction]] = [
            ("release", {"amount": "0.31"}, Fraction("0.31")),
            ("refund", {"amount": "0.17"}, Fraction("0.17")),
            ("settle", {"release": "0.11", "refund": "0.07"}, Fraction("0.18")),
            ("topup", {"amount": "0.05"}, Fraction("-0.05")),
        ]
        work = [kinds[number % len(kinds)] for number in _WORK]
        answers = await asyncio.gather(*(_post(m, name, what, **body) for what, body, _ in work))
        assert set(answers) <= {200, 409}
        took = sum(
            share for (*_, share), status in zip(work, answers, strict=True) if status == 200
        )
        assert Fraction((await m.show(name))["remaining"]) == 10 - took >= 0


async def test_one_key_from_64_writers_pays_once(db: str) -> None:
    """I11, I12: the same idempotency key at once from everywhere has the effect of one call."""
    async with market(db) as m:
        name = await lock(m)
        answers = await asyncio.gather(
            *(_post(m, name, "release", key="one", amount="0.25") for _ in _WORK)
        )
        assert set(answers) <= {200, 409}
        assert (await m.show(name))["released"] == "0.25"
        assert await _post(m, name, "release", key="one", amount="0.25") == 200
        assert (await m.show(name))["released"] == "0.25"


async def test_threads_never_pay_more_than_was_locked(db: str) -> None:
    """I12: eight ledgers in eight threads, as eight services would have, eight releases each."""
    async with market(db) as m:
        name = await lock(m)
        settings = m.escrow.settings

        def work(_: int) -> list[int]:
            return asyncio.run(_release_from_a_ledger(settings, m.buyer.agent_id, name))

        with ThreadPoolExecutor(8) as threads:
            loop = asyncio.get_running_loop()
            found = await asyncio.gather(
                *(loop.run_in_executor(threads, work, number) for number in range(8))
            )
        assert Counter(status for statuses in found for status in statuses) == {200: 40, 409: 24}
        assert (await m.show(name))["released"] == "10.00"


@pytest.mark.skipif(not LONG, reason="takes a minute: X402MW_LONG=1")
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_processes_never_pay_more_than_was_locked(kind: str, tmp_path: Path) -> None:
    """I12: three service processes on one database, 64 releases through all of them at once."""
    if kind == "sqlite":
        await _release_through_processes(tmp_path)
        return
    with fresh_database() as url:
        await _release_through_processes(url)


async def _release_through_processes(place: Path | str) -> None:
    with escrow_process(place) as a, escrow_process(place) as b, escrow_process(place) as c:
        async with joined(a) as m:
            name = await lock(m)
            clients = [client_of(process.url) for process in (a, b, c)]
            body = {"amount": "0.25"}
            answers = await asyncio.gather(
                *(
                    clients[number % 3].post(
                        f"/escrow/{name}/release", json=body, headers=m.buyer.headers
                    )
                    for number in _WORK
                )
            )
            for client in clients:
                await client.aclose()
            assert Counter(answer.status_code for answer in answers) == {200: 40, 409: 24}
            assert (await m.show(name))["released"] == "10.00"
        a.check()


_WORK = range(WRITERS)


async def _post(m: Market, name: str, what: str, *, key: str | None = None, **body: Any) -> int:
    return (await m.post(m.buyer, f"/escrow/{name}/{what}", body, key=key)).status_code


async def _release_from_a_ledger(settings: Settings, buyer: str, name: str) -> list[int]:
    ledger = await open_ledger(settings, MovingClock(), serving=False)
    wish = manual_bodies.Pay.model_validate({"amount": "0.25"})
    try:
        answers = await asyncio.gather(
            *(
                ledger.perform(lambda tx: manual.release(tx, buyer, name, wish), caller=buyer)
                for _ in range(WRITERS // 8)
            )
        )
        return [answer.status for answer in answers]
    finally:
        await ledger.close()

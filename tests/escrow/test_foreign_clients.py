"""Clients that know nothing of us: only the base URL and the key are ours."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.escrow.foreign import NumberDialect, TextBilling, by_curl, by_httpx, by_requests
from tests.escrow.market import Market, market
from tests.support.escrow import START

pytestmark = pytest.mark.anyio

SENDERS = [
    by_requests,
    by_httpx,
    pytest.param(
        by_curl, marks=pytest.mark.skipif(not shutil.which("curl"), reason="there is no curl")
    ),
]
each_way = pytest.mark.parametrize("send", SENDERS, ids=lambda send: getattr(send, "__name__", ""))
each_base = pytest.mark.parametrize("base", ["/api", "/api/v1"])


async def visit(m: Market, story: Callable[[str, str, str], None], base: str) -> None:
    """Runs a foreign program (base URL, key, provider) in a thread: the escrow serves here."""
    await asyncio.to_thread(story, m.escrow.url + base, m.buyer.api_key, m.provider.agent_id)


@each_way
async def test_the_number_dialect_buys(send: Any, tmp_path: Path) -> None:
    """E1, E3, E7, E9: numbers in and out, whole batches and crumbs, the rest back at the close."""

    def story(base: str, key: str, provider: str) -> None:
        pf = NumberDialect(send, base, key)
        eid = pf.create_escrow(5.00, provider, 1)
        assert eid.startswith("esc_")
        assert pf.balance(eid) == 5.0
        for _ in range(3):
            status, answer = pf.release(eid, 1000 * 0.0000001, provider, "inference-stream-batch")
            assert (status, answer["provider"]) == (200, provider)
        balance = pf.balance(eid)
        assert f"{balance:.4f}" == "4.9997"
        assert balance >= 0.10
        closed = pf.close(eid)
        assert (closed["status"], closed["balance_usdc"]) == ("settled", 0.0)

    async with market(tmp_path) as m:
        await visit(m, story, "/api")
        assert (await m.balance(m.buyer), await m.balance(m.provider)) == ("99.9997", "0.000297")


@each_way
async def test_the_text_dialect_buys(send: Any, tmp_path: Path) -> None:
    """E2, E4, E5, E6, E8, E20: texts in and out; part, refund, full release, status, list."""

    def story(base: str, key: str, provider: str) -> None:
        billing = TextBilling(send, base, key)
        made = billing.lock(provider, "10.00", "a report", 24)
        assert made["escrow_id"].startswith("esc_")
        fields = {name: made[name] for name in ("status", "amount", "released", "remaining")}
        assert fields == {
            "status": "locked",
            "amount": "10.00",
            "released": "0.00",
            "remaining": "10.00",
        }
        eid = made["escrow_id"]
        assert billing.release(eid, "2.50", "calls 1-100")["status"] == "partially_released"
        assert billing.refund(eid, "1.50")["remaining"] == "6.00"
        shown = billing.status(eid)
        assert (shown["released"], shown["remaining"]) == ("2.50", "6.00")
        assert billing.release(eid)["status"] == "settled"
        whole = billing.lock(provider, "1.00", "one call")["escrow_id"]
        assert billing.refund(whole)["status"] == "refunded"
        listed = billing.list(shown["from_agent_id"])["items"]
        assert [item["escrow_id"] for item in listed] == [whole, eid]
        assert billing.list(provider)["code"] == "not_found"

    async with market(tmp_path) as m:
        await visit(m, story, "/api/v1")
        assert (await m.balance(m.buyer), await m.balance(m.provider)) == ("91.50", "8.415")


@each_base
async def test_both_dialects_are_understood_on_both_paths(base: str, tmp_path: Path) -> None:
    """X6, X7: a request may use either dialect's names anywhere; the base path decides answers."""

    def story(url: str, key: str, provider: str) -> None:
        number, text = NumberDialect(by_httpx, url, key), TextBilling(by_httpx, url, key)
        eid = number.create_escrow(2.0, provider, 2)
        assert text.release(eid, "0.5")["remaining"] == "1.50"
        other = text.lock(provider, "3.00", "b", 2)["escrow_id"]
        assert number.release(other, 0.25, provider, "c")[1]["released"] == "0.25"
        shown = text.status(eid)
        assert shown["memo"] == "inference session"
        assert ("balance_usdc" in shown) == (base == "/api")
        assert ("description" in shown) == (base == "/api")

    async with market(tmp_path) as m:
        await visit(m, story, base)


@each_base
async def test_floats_as_their_authors_write_them(base: str, tmp_path: Path) -> None:
    """A12, A13, M4: `str(float)` and rounded products are read digit by digit, and add up."""

    def story(url: str, key: str, provider: str) -> None:
        number, text = NumberDialect(by_requests, url, key), TextBilling(by_requests, url, key)
        eid = text.lock(provider, "10.00", "crumbs")["escrow_id"]
        for count in (9, 13, 18, 26, 36):
            text.release(eid, str(float("0.001") * count))
        assert text.release(eid, str(84e-6))["released"] == "0.102084"
        assert number.release(eid, 1000 * 0.0000001, provider, "")[1]["released"] == "0.102184"
        for _ in range(10):
            number.release(eid, 0.0000137, provider, "batch")
        assert text.status(eid)["released"] == "0.102321"

    async with market(tmp_path) as m:
        await visit(m, story, base)


async def test_a_recipient_is_the_provider(tmp_path: Path) -> None:
    """X6: a release cannot send the money to anybody else."""

    def story(url: str, key: str, provider: str) -> None:
        number = NumberDialect(by_httpx, url, key)
        eid = number.create_escrow(2.0, provider, 2)
        status, problem = number.release(eid, 1.0, "ag_" + "1" * 32, "to a friend")
        assert (status, problem["code"]) == (409, "recipient_mismatch")
        assert number.balance(eid) == 2.0

    async with market(tmp_path) as m:
        await visit(m, story, "/api")


async def test_what_is_left_when_the_timer_fires_is_released(tmp_path: Path) -> None:
    """E11: a lock by hours or seconds of auto-release pays its provider at the end."""
    made: list[str] = []

    def story(url: str, key: str, provider: str) -> None:
        made.append(NumberDialect(by_httpx, url, key).create_escrow(4.0, provider, 2))
        made.append(TextBilling(by_httpx, url, key).lock(provider, "4.00", "", 2)["escrow_id"])

    async with market(tmp_path) as m:
        await visit(m, story, "/api/v1")
        assert {(await m.show(eid))["expires_at"] for eid in made} == {int(START) + 7200}
        await m.escrow.pass_time(7200)
        assert [(await m.show(eid))["status"] for eid in made] == ["released", "released"]
        assert await m.balance(m.provider) == "7.92"

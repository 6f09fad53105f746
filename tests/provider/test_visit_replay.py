"""The same payment again: at once, later, with other credentials, and after everything changed."""

import asyncio
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from tests.support.payments import NOW
from tests.support.provider import Handler, Line, body, make_scope, selling, start, text
from x402mw.provider import PerCall, PerUnit, Priced

pytestmark = pytest.mark.anyio

PRICES = {"GET /quote/{symbol}": PerCall("0.001")}
LONG = b"x" * 20_000


class Slow:
    """A step of a handler that waits until it is told to go on."""

    def __init__(self) -> None:
        self.entered, self.go = asyncio.Event(), asyncio.Event()

    async def __call__(self, scope: Any, receive: Any) -> None:
        self.entered.set()
        await self.go.wait()


async def test_a_thousand_at_once_run_once(tmp_path):
    """The same header 1,000 times at once: one run, one charge, all others 409 or the outcome."""
    slow = Slow()
    handler = Handler(slow, *text("goods"))
    async with selling(handler, PRICES, tmp_path) as shop:
        header = shop.header(shop.payment())
        calls = [asyncio.create_task(shop.call("GET", "/quote/BTC", [header])) for _ in range(1000)]
        await slow.entered.wait()
        # While it runs the others are turned away; some come after it is done.
        await asyncio.wait(calls, timeout=10, return_when=asyncio.FIRST_COMPLETED)
        slow.go.set()
        answers = await asyncio.gather(*calls)
        assert handler.runs == 1
        found = Counter(one.status for one in answers)
        assert set(found) <= {200, 409}
        first = [
            one for one in answers if one.status == 200 and not one.header("idempotent-replayed")
        ]
        assert len(first) == 1
        assert all(one.body == b"goods" for one in answers if one.status == 200)
        assert {one.problem["code"] for one in answers if one.status == 409} == {"running"}
        assert (await shop.account()).charged == 1000


async def test_two_hundred_calls_of_one_session_in_any_order(tmp_path):
    """Parallel calls of one session all pass, whatever the order of their vouchers."""
    handler = Handler()
    async with selling(handler, PRICES, tmp_path) as shop:
        # Seven is no divisor of 200, so every cumulative amount comes up once, out of order.
        order = [(seq, 1000 * (seq * 7 % 200 + 1)) for seq in range(200)]
        top = shop.payment(seq=999, cumulative=201_000)
        assert (await shop.pay(top)).status == 200
        answers = await asyncio.gather(
            *(shop.pay(shop.payment(seq=seq, cumulative=most)) for seq, most in order)
        )
        assert {one.status for one in answers} == {200}
        assert (await shop.account()).charged == 201_000


@pytest.mark.parametrize(
    "script",
    [
        pytest.param((start(length=5), body(b"goods")), id="held"),
        pytest.param((start(length=len(LONG)), body(LONG)), id="long"),
        pytest.param((start(), body(b"goods")), id="stream"),
    ],
)
async def test_a_retry_while_the_answer_is_sent_is_running(tmp_path, script):
    """While a settled answer is still on its way, the same bytes get 409 running."""
    async with selling(Handler(*script), PRICES, tmp_path) as shop:
        header = shop.header(shop.payment())
        go, entered = asyncio.Event(), asyncio.Event()

        async def slow_send(message: Any) -> None:
            if message["type"] == "http.response.body":
                entered.set()
                await go.wait()

        line = Line()
        scope = make_scope("GET", "/quote/BTC", [header])
        first = asyncio.create_task(shop.app(scope, line.receive, slow_send))
        await entered.wait()
        again = await shop.call("GET", "/quote/BTC", [header])
        assert (again.status, again.problem["code"]) == (409, "running")
        assert again.header("retry-after") == "1"
        assert again.paid["extra"]["state"] == "running"
        assert again.paid["extra"]["final"] is False
        go.set()
        await first
        late = await shop.call("GET", "/quote/BTC", [header])
        assert late.status == (
            200 if script[0]["headers"][:1] == [(b"content-length", b"5")] else 410
        )
        assert late.paid["amount"] == "1000"


async def test_a_stored_outcome_is_the_same_answer_without_cookies(tmp_path):
    """A retry gets status, headers and body of the first answer, but never its Set-Cookie."""
    first, last = text("goods", 201)
    first["headers"] += [(b"set-cookie", b"secret=1"), (b"etag", b'"1"')]
    handler = Handler(first, last)
    async with selling(handler, PRICES, tmp_path) as shop:
        one, two = [await shop.pay(shop.payment()) for _ in range(2)]
        assert (two.status, two.body, two.header("etag")) == (201, b"goods", '"1"')
        assert two.header("set-cookie") is None
        assert two.header("idempotent-replayed") == "true"
        assert two.header("cache-control") == "private"
        assert two.paid == one.paid
        assert handler.runs == 1


async def test_a_retry_of_head_has_no_body(tmp_path):
    """The stored outcome of a HEAD request has no body either."""
    async with selling(Handler(), PRICES, tmp_path) as shop:
        payment = shop.payment(method="HEAD")
        await shop.pay(payment)
        again = await shop.pay(payment)
        assert (again.status, again.body) == (200, b"")
        assert again.header("content-length") == "4"


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [
        ([(b"authorization", b"a")], [(b"authorization", b"a")], 200),
        ([(b"authorization", b"a")], [(b"authorization", b"b")], 409),
        ([(b"authorization", b"a")], [], 409),
        ([], [(b"cookie", b"a")], 409),
        ([(b"cookie", b"a")], [(b"cookie", b"a")], 200),
        ([(b"cookie", b"a"), (b"cookie", b"b")], [(b"cookie", b"b"), (b"cookie", b"a")], 409),
        ([(b"authorization", b"a")], [(b"cookie", b"a")], 409),
    ],
)
async def test_a_stored_outcome_needs_the_same_credentials(tmp_path, first, second, status):
    """The answer for one Authorization and Cookie is not given to another."""
    handler = Handler(*text("private goods"))
    async with selling(handler, PRICES, tmp_path) as shop:
        await shop.pay(shop.payment(), first)
        again = await shop.pay(shop.payment(), second)
        assert (again.status, handler.runs) == (status, 1)
        if status == 409:
            assert again.problem["code"] == "credentials"
            assert b"goods" not in again.body
            assert again.account == ("settled", "1000", "1000")


async def test_a_used_seq_takes_no_other_voucher(tmp_path):
    """Another voucher for a used seq is 409 with the charge, and never runs the handler."""
    handler = Handler()
    async with selling(handler, PRICES, tmp_path) as shop:
        await shop.pay(shop.payment())
        other = await shop.pay(shop.payment(cumulative=2000))
        assert (other.status, other.problem["code"], handler.runs) == (409, "seq_used", 1)
        assert other.account == ("settled", "1000", "1000")
        assert other.paid["transaction"] == shop.payment().signed.commitment_id


async def test_an_answer_that_is_not_kept_is_gone_with_its_charge(tmp_path):
    """store_body=False: the retry is 410 with the charge, and never runs the handler."""
    handler = Handler()
    prices = {"GET /quote/{symbol}": Priced(PerCall("0.001"), store_body=False)}
    async with selling(handler, prices, tmp_path) as shop:
        await shop.pay(shop.payment())
        again = await shop.pay(shop.payment())
        assert (again.status, again.problem["code"], handler.runs) == (410, "outcome_gone", 1)
        assert again.account == ("settled", "1000", "1000")


async def test_a_late_retry_finds_its_outcome_whatever_changed(tmp_path):
    """After voucher and token expired, terms changed and the session closed: still the outcome."""
    handler = Handler()
    async with selling(handler, PRICES, tmp_path) as shop:
        payment = shop.payment()
        await shop.pay(payment)
        header = shop.header(payment)
        shop.clock.now = NOW + 700
        shop.link.away = shop.link.clock_off = True
        book = shop.service.book
        shop.service.book = replace(book, offers={})
        assert (await shop.pay(shop.control({"op": "close"}, seq=100))).status == 200
        again = await shop.call("GET", "/quote/BTC", [header])
        assert (again.status, again.body, handler.runs) == (200, b"done", 1)
        assert again.account == ("settled", "1000", "1000")
        new = await shop.call("GET", "/quote/BTC", [shop.header(shop.payment(seq=8))])
        assert (new.status, new.problem["code"]) == (402, "session_closing")
        assert handler.runs == 1


async def test_a_forgotten_seq_is_no_402(tmp_path):
    """Once its row may be gone nobody knows what became of it: 410, never terms to sign anew."""
    handler = Handler()
    async with selling(handler, PRICES, tmp_path) as shop:
        await shop.pay(shop.payment())
        shop.clock.now = NOW + 5000
        await shop.pay(shop.payment(seq=8))
        for now in (NOW + 5000, NOW):
            shop.clock.now = now
            again = await shop.pay(shop.payment())
            assert (again.status, again.problem["code"], handler.runs) == (410, "forgotten", 1)
            assert (again.paid["success"], again.paid["extra"]["final"]) == (False, False)
            assert again.header("payment-required") is None


async def test_a_metered_stream_is_told_by_its_retry(tmp_path):
    """The retry of a finished stream is 410 with the final charge."""
    prices = {"GET /quote/{symbol}": PerUnit("token", "0.001", max_units=5, base="0.0005")}
    async with selling(Handler(start(), body(b"x")), prices, tmp_path) as shop:
        payment = shop.payment(cumulative=100_000)
        await shop.pay(payment)
        again = await shop.pay(payment)
        assert (again.status, again.account) == (410, ("settled", "500", "500"))

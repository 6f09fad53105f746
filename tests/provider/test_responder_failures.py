"""What a call costs when something fails around it: time, the journal, the buyer, the server."""

import asyncio
from typing import Any

import pytest

from tests.support.provider import (
    Handler,
    Line,
    Shop,
    answer_of,
    body,
    count,
    make_scope,
    selling,
    start,
    text,
)
from x402mw.core.gate import CallState, Refused
from x402mw.provider import PerCall, PerUnit, service
from x402mw.provider.journal import JournalUnavailable

pytestmark = pytest.mark.anyio

CALL, METER = "GET /call", "GET /meter"
PER_UNIT = PerUnit("token", "0.002", per=1000, max_units=4000, base="0.0001")
PRICES = {CALL: PerCall("0.001"), METER: PER_UNIT}
LONG = b"x" * 20_000


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(service, "SETTLE_RETRY_SECONDS", 0.01)


def payment(shop: Shop, route: str, **changes: Any):
    return shop.payment(route, target=route[4:], cumulative=10_000, **changes)


def hurry(shop: Shop, seconds: float = 0.05) -> None:
    """Makes every call time out soon."""
    for served in shop.service.served.values():
        object.__setattr__(served.route.options, "timeout_seconds", seconds)


async def forever(scope, receive) -> None:
    await asyncio.Event().wait()


async def free(shop: Shop) -> None:
    """Waits until nothing is reserved."""
    async with asyncio.timeout(10):
        while (await shop.account()).reserved:
            pass


# Time.


@pytest.mark.parametrize("route", [CALL, METER])
@pytest.mark.parametrize(
    "before", [(), (start(length=4),), (start(length=4), body(b"a", more=True))]
)
async def test_a_call_that_takes_too_long_is_ended_and_costs_nothing(tmp_path, route, before):
    """A handler stopped before the first byte: 504 that says so, nothing charged."""
    async with selling(Handler(*before, forever), PRICES, tmp_path) as shop:
        hurry(shop)
        answer = await shop.pay(payment(shop, route))
        assert answer.status == 504
        assert answer.problem["code"] == "timeout"
        assert answer.account == ("settled", "0", "0")


@pytest.mark.parametrize(("route", "charge"), [(CALL, 1000), (METER, 300)])
async def test_a_stream_that_takes_too_long_costs_what_was_delivered(tmp_path, route, charge):
    """A stream stopped by its time breaks off visibly, and costs what went out."""
    counted = (count(tokens=100),) if route == METER else ()
    handler = Handler(start(), *counted, body(b"a", more=True), forever)
    async with selling(handler, PRICES, tmp_path) as shop:
        hurry(shop)
        with pytest.raises(TimeoutError) as caught:
            await shop.pay(payment(shop, route))
        assert not caught.value.answer.finished
        assert (await shop.account()).charged == charge


async def test_a_handler_that_ignores_its_end_gets_no_answer_through(tmp_path):
    """Once its time is over nothing of a handler's answer is served, even if it goes on."""

    async def stubborn(scope, receive) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return

    async with selling(Handler(stubborn, *text("late")), PRICES, tmp_path) as shop:
        hurry(shop)
        answer = await answer_of(shop.pay(payment(shop, CALL)))
        assert answer.status == 504
        assert answer.account == ("settled", "0", "0")


async def test_what_a_handler_does_after_its_answer_is_not_timed(tmp_path):
    """Background work after the response is neither cut off nor holds the seq."""
    seen: list[CallState | None] = []

    async def background(scope, receive) -> None:
        await asyncio.sleep(0.1)
        seen.append(await shop.state(7))

    handler = Handler(*text(), background)
    async with selling(handler, PRICES, tmp_path) as shop:
        hurry(shop)
        assert (await shop.pay(payment(shop, CALL))).status == 200
        assert seen == [CallState.SETTLED]


async def test_a_retry_during_background_work_gets_the_answer(tmp_path):
    """The seq is not running any more once the last byte went out."""
    replays = []

    async def background(scope, receive) -> None:
        replays.append(await shop.pay(payment(shop, CALL)))

    handler = Handler(*text(), background)
    async with selling(handler, PRICES, tmp_path) as shop:
        await shop.pay(payment(shop, CALL))
        assert [one.header("idempotent-replayed") for one in replays] == ["true"]
        assert handler.runs == 1


# The journal.


def break_journal(shop: Shop, name: str, times: int = 10**6) -> list[str]:
    """Makes a write of the journal fail so many times."""
    real, failures = getattr(shop.journal, name), []

    async def failing(*args: Any, **more: Any) -> Any:
        if len(failures) < times:
            failures.append(name)
            raise JournalUnavailable("disk full at /secret/path")
        return await real(*args, **more)

    setattr(shop.journal, name, failing)
    return failures


async def test_a_journal_that_cannot_admit_serves_nothing(tmp_path):
    """Admission that cannot be written: 503 with Retry-After, the handler never runs."""
    handler = Handler()
    async with selling(handler, PRICES, tmp_path) as shop:
        break_journal(shop, "admit")
        answer = await shop.pay(payment(shop, CALL))
        assert (answer.status, handler.runs) == (503, 0)
        assert answer.header("retry-after") == "5"
        assert answer.paid["extra"]["state"] == "refused"
        assert answer.paid["extra"]["final"] is False
        assert b"secret" not in answer.body


@pytest.mark.parametrize("times", [1, 2, 5])
@pytest.mark.parametrize("route", [CALL, METER])
@pytest.mark.parametrize(
    "script",
    [
        pytest.param(text("the goods"), id="short"),
        pytest.param((start(length=len(LONG)), body(LONG)), id="long"),
        pytest.param((RuntimeError("boom"),), id="raises"),
    ],
)
async def test_a_charge_that_cannot_be_written_serves_nothing(tmp_path, route, script, times):
    """A charge that cannot be written: 503, nothing of the answer goes out, voided later."""
    async with selling(Handler(*script), PRICES, tmp_path) as shop:
        break_journal(shop, "settle", times)
        answer = await answer_of(shop.pay(payment(shop, route)))
        assert answer.status == 503
        assert b"goods" not in answer.body
        assert answer.paid["extra"]["state"] in ("running", "settled")
        await free(shop)
        assert (await shop.account()).charged == 0
        again = await shop.pay(payment(shop, route))
        assert (again.status, again.paid["amount"]) == (410, "0")


async def test_a_handler_that_swallows_the_failure_serves_nothing(tmp_path):
    """Even a handler that goes on after the journal failed gets nothing through."""

    async def app(scope, receive, send) -> None:
        for message in (*text("goods"), *text("more goods")):
            try:
                await send(message)
            except OSError:
                continue

    async with selling(app, PRICES, tmp_path) as shop:
        break_journal(shop, "settle", 1)
        answer = await shop.pay(payment(shop, CALL))
        assert answer.status == 503
        assert b"goods" not in answer.body
        await free(shop)
        assert (await shop.account()).charged == 0


@pytest.mark.parametrize("name", ["mark", "settle"])
async def test_a_stream_breaks_off_when_the_journal_fails(tmp_path, monkeypatch, name):
    """A stream whose marks or figure cannot be written breaks off, and is charged later."""
    monkeypatch.setattr("x402mw.provider.responder.MARK_SECONDS", -1.0)
    steps = (start(), count(tokens=100), body(b"a", more=True), body(b"last"))
    async with selling(Handler(*steps), PRICES, tmp_path) as shop:
        break_journal(shop, name, 2)
        with pytest.raises(ConnectionAbortedError) as caught:
            await shop.pay(payment(shop, METER))
        assert b"last" not in caught.value.answer.body
        await free(shop)
        assert (await shop.account()).charged == 300


async def test_a_stream_that_cannot_be_marked_as_begun_does_not_begin(tmp_path):
    """A stream begins only once that is durable: else 503 and nothing charged."""
    async with selling(Handler(start(), body(b"goods")), PRICES, tmp_path) as shop:
        break_journal(shop, "start")
        answer = await shop.pay(payment(shop, METER))
        assert answer.status == 503
        assert answer.account == ("settled", "0", "0")


async def test_stopping_waits_for_charges_under_way(tmp_path):
    """A charge that is being written when the provider stops is not lost."""
    handler = Handler(start(), count(tokens=100), body(b"a", more=True), forever)
    async with selling(handler, PRICES, tmp_path) as shop:
        entered, go, line = asyncio.Event(), asyncio.Event(), Line()
        real = shop.journal.settle

        async def slow(*args: Any, **more: Any) -> Any:
            entered.set()
            await go.wait()
            return await real(*args, **more)

        shop.journal.settle = slow
        scope = make_scope("GET", "/meter", [shop.header(payment(shop, METER))])
        call = asyncio.create_task(shop.app(scope, line.receive, line.send))
        await line.until(2)
        call.cancel()
        await entered.wait()
        # Now it waits for its charge, shielded; a server in a hurry cancels once more.
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        stopping = asyncio.create_task(shop.middleware._stop())
        await asyncio.sleep(0)
        go.set()
        await stopping
        shop.service = await shop.middleware._ready({"type": "http"})
        assert (await shop.account()).charged == 300


# Cancellation and the buyer.

SCRIPTS = {
    "short": (CALL, text("x")),
    "long": (CALL, (start(length=len(LONG)), body(LONG[:10_000], more=True), body(LONG[10_000:]))),
    "stream": (METER, (start(), count(tokens=1), body(b"a", more=True), body(b"b"))),
    "metered": (METER, (count(tokens=1), *text("x"))),
}


@pytest.mark.parametrize("kind", list(SCRIPTS))
async def test_cancelling_anywhere_leaves_nothing_reserved(tmp_path, kind):
    """Wherever a request is cancelled, its reservation becomes a charge or nothing."""
    route, script = SCRIPTS[kind]

    async def breathe(scope, receive) -> None:
        await asyncio.sleep(0)

    steps = [one for step in script for one in (breathe, step)]
    async with selling(Handler(*steps), PRICES, tmp_path) as shop:
        for seq in range(1, 120):
            one = shop.payment(route, target=route[4:], cumulative=1_000_000, seq=seq)
            call = asyncio.create_task(shop.pay(one))
            for _ in range(seq // 2):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
        await free(shop)
        assert not shop.service.running


@pytest.mark.parametrize("name", ["admit", "settle", "start", "mark"])
async def test_cancelling_while_the_journal_writes(tmp_path, monkeypatch, name):
    """A request cancelled during any write of the journal leaves nothing reserved."""
    monkeypatch.setattr("x402mw.provider.responder.MARK_SECONDS", -1.0)
    steps = (start(), count(tokens=100), body(b"a", more=True), body(b"b"))
    async with selling(Handler(*steps), PRICES, tmp_path) as shop:
        real, line = getattr(shop.journal, name), Line()
        call: asyncio.Task[Any]

        async def cancelled(*args: Any, **more: Any) -> Any:
            setattr(shop.journal, name, real)
            call.cancel()
            return await real(*args, **more)

        setattr(shop.journal, name, cancelled)
        header = shop.header(payment(shop, METER))
        scope = make_scope("GET", "/meter", [header])
        call = asyncio.create_task(shop.app(scope, line.receive, line.send))
        with pytest.raises(asyncio.CancelledError):
            await call
        await free(shop)
        expected = {"admit": 0, "start": 0, "mark": 300, "settle": 300}[name]
        assert (await shop.account()).charged == expected


@pytest.mark.parametrize(("route", "charge"), [(CALL, 1000), (METER, 300)])
async def test_a_buyer_that_goes_away_pays_for_what_was_sent(tmp_path, route, charge):
    """The buyer goes away during a stream: the price, or what was counted until then."""
    counted = (count(tokens=100),) if route == METER else ()

    async def gone(scope, receive) -> None:
        assert (await receive())["type"] == "http.request"
        assert (await receive())["type"] == "http.disconnect"

    handler = Handler(start(), *counted, body(b"a", more=True), gone)
    async with selling(handler, PRICES, tmp_path) as shop:
        line = Line()
        header = shop.header(payment(shop, route))
        scope = make_scope("GET", route[4:], [header])
        call = asyncio.create_task(shop.app(scope, line.receive, line.send))
        await line.until(2)
        line.gone.set()
        await call
        assert (await shop.account()).charged == charge


async def test_a_connection_that_breaks_while_a_short_answer_is_sent(tmp_path):
    """A short answer that could not be delivered is charged and kept: the retry gets it."""
    handler = Handler(*text("goods"))
    async with selling(handler, PRICES, tmp_path) as shop:
        line = Line()

        async def broken(message) -> None:
            raise OSError("connection reset")

        scope = make_scope("GET", "/call", [shop.header(payment(shop, CALL))])
        with pytest.raises(OSError, match="reset"):
            await shop.app(scope, line.receive, broken)
        again = await shop.pay(payment(shop, CALL))
        assert (again.status, again.body, handler.runs) == (200, b"goods", 1)
        assert again.account == ("settled", "1000", "1000")


async def test_a_buyer_that_goes_away_before_its_body_is_whole(tmp_path):
    """A request that never becomes whole is no request: nothing happens."""
    handler = Handler()
    async with selling(handler, PRICES, tmp_path) as shop:
        line = Line([])
        line.gone.set()
        scope = make_scope("GET", "/call", [shop.header(payment(shop, CALL))])
        await shop.app(scope, line.receive, line.send)
        assert (line.answer.messages, handler.runs) == ([], 0)
        assert await shop.state(7) is None


async def test_a_server_that_cancels_gets_no_answer(tmp_path):
    """A cancelled call is voided and its cancellation goes on: nobody is there to be answered."""
    async with selling(Handler(forever), PRICES, tmp_path) as shop:
        line = Line()
        scope = make_scope("GET", "/call", [shop.header(payment(shop, CALL))])
        call = asyncio.create_task(shop.app(scope, line.receive, line.send))
        async with asyncio.timeout(10):
            while await shop.state(7) is None:
                pass
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert line.answer.messages == []
        assert await shop.state(7) is CallState.SETTLED


@pytest.mark.parametrize("error", [Refused(402, "cover", "not ours"), JournalUnavailable("theirs")])
async def test_a_handler_that_raises_our_own_errors_gets_one_answer(tmp_path, error):
    """Errors of this package that come out of an app are its failure: one 500, nothing charged."""

    async def nested(scope, receive) -> None:
        raise error

    async with selling(Handler(nested), PRICES, tmp_path) as shop:
        with pytest.raises(RuntimeError, match="payment layer") as caught:
            await shop.pay(payment(shop, CALL))
        answer = caught.value.answer
        assert (answer.status, answer.finished) == (500, True)
        assert (await shop.account()).charged == 0

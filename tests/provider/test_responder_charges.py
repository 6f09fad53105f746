"""The charge table of `docs/provider.md`, row by row, for both kinds of price."""

import contextlib
from typing import Any

import pytest

from tests.support.provider import Handler, answer_of, body, count, selling, start, text
from x402mw.core.errors import WrongUnit
from x402mw.core.gate import CallState
from x402mw.provider import PerCall, PerUnit, Priced

pytestmark = pytest.mark.anyio

CALL, METER = "GET /call", "GET /meter"
PER_UNIT = PerUnit("token", "0.002", per=1000, max_units=4000, base="0.0001")
PRICES = {CALL: PerCall("0.001"), METER: PER_UNIT}
LONG = b"x" * 20_000

WHOLE = text()
LONG_KNOWN = (start(length=len(LONG)), body(LONG[:9000], more=True), body(LONG[9000:]))
STREAM = (start(), body(b"a", more=True), body(b"b", more=True), body())
BOOM = RuntimeError("boom")


async def run(tmp_path, route: str, *script: Any, options: Any = None, method: str = "GET"):
    """Runs one paid call; returns its answer, and the session's charge and the call's state."""
    handler = Handler(*script)
    prices = {**PRICES, **({route: options} if options else {})}
    async with selling(handler, prices, tmp_path) as shop:
        payment = shop.payment(route, target=route[4:], cumulative=10_000, method=method)
        answer = await answer_of(shop.pay(payment))
        return answer, (await shop.account()).charged, await shop.state(payment.seq)


SUCCESS = [
    pytest.param(WHOLE, id="short"),
    pytest.param(LONG_KNOWN, id="long"),
    pytest.param(STREAM, id="stream"),
    pytest.param(text("", 204), id="204"),
    pytest.param((start(204), body()), id="204 without length"),
    pytest.param((start(304), body()), id="304"),
    pytest.param((start(307, (b"location", b"/"), length=0), body()), id="redirect"),
]


@pytest.mark.parametrize("script", SUCCESS)
async def test_success_costs_the_price(tmp_path, script):
    """2xx and 3xx cost the price of a call, whatever the answer looks like."""
    answer, charged, state = await run(tmp_path, CALL, *script)
    assert answer.finished
    assert (charged, state) == (1000, CallState.SETTLED)
    assert answer.account == ("settled", "1000", "1000")


@pytest.mark.parametrize("script", SUCCESS)
async def test_success_costs_what_was_counted(tmp_path, script):
    """A metered success costs the base and what was counted."""
    answer, charged, state = await run(tmp_path, METER, count(tokens=100), *script)
    assert answer.finished
    assert (charged, state) == (100 + 200, CallState.SETTLED)


@pytest.mark.parametrize("script", SUCCESS)
async def test_success_that_counts_nothing_costs_the_base(tmp_path, script):
    """A metered success without a count costs the plan's base."""
    _, charged, _ = await run(tmp_path, METER, *script)
    assert charged == 100


@pytest.mark.parametrize("route", [CALL, METER])
@pytest.mark.parametrize("status", [400, 402, 404, 422, 429, 500, 503])
@pytest.mark.parametrize("kind", ["short", "long", "stream"])
async def test_errors_cost_nothing(tmp_path, route, status, kind):
    """4xx and 5xx of the handler cost nothing, and are passed on with our header."""
    script = {
        "short": text("no", status),
        "long": (start(status, length=len(LONG)), body(LONG)),
        "stream": (start(status), body(b"no", more=True), body()),
    }[kind]
    steps = script if route == CALL else (count(tokens=100), *script)
    answer, charged, state = await run(tmp_path, route, *steps)
    assert answer.status == status
    assert answer.finished
    assert (charged, state) == (0, CallState.SETTLED)
    assert answer.account == ("settled", "0", "0")


@pytest.mark.parametrize(("status", "charge"), [(404, 1000), (410, 0)])
async def test_also_charge_lists_errors_that_cost(tmp_path, status, charge):
    """A status in also_charge is paid for, its neighbours are not."""
    options = Priced(PerCall("0.001"), also_charge=(404,))
    assert (await run(tmp_path, CALL, *text("", status), options=options))[1] == charge


@pytest.mark.parametrize("route", [CALL, METER])
@pytest.mark.parametrize(
    "script",
    [
        pytest.param((BOOM,), id="at once"),
        pytest.param((start(length=4), BOOM), id="after a held start"),
        pytest.param((start(length=4), body(b"do", more=True), BOOM), id="after a held part"),
        pytest.param((start(length=4), body(b"done", more=True), BOOM), id="after a held whole"),
        pytest.param((start(204), BOOM), id="after a held 204"),
    ],
)
async def test_an_exception_before_the_first_byte_costs_nothing(tmp_path, route, script):
    """An exception before the first byte is our own 500, costs nothing, and goes on its way."""
    steps = script if route == CALL else (count(tokens=100), *script)
    answer, charged, state = await run(tmp_path, route, *steps)
    assert (answer.status, charged, state) == (500, 0, CallState.SETTLED)
    assert answer.problem["code"] == "handler_failed"
    assert "boom" not in answer.body.decode()
    assert answer.account == ("settled", "0", "0")


async def test_an_exception_before_the_held_start_of_a_long_metered_answer(tmp_path):
    """A metered answer of known length has not begun before its first body message."""
    steps = (count(tokens=100), start(length=len(LONG)), BOOM)
    answer, charged, _ = await run(tmp_path, METER, *steps)
    assert (answer.status, charged) == (500, 0)


@pytest.mark.parametrize(
    ("route", "charge"),
    [(CALL, 1000), (METER, 100 + 200)],
)
@pytest.mark.parametrize("ending", [(BOOM,), ()])
async def test_breaking_off_after_the_first_byte(tmp_path, route, charge, ending):
    """A stream that breaks off costs the price, or what was counted until then."""
    counted = (count(tokens=100),) if route == METER else ()
    steps = (start(), *counted, body(b"a", more=True), *ending)
    answer, charged, state = await run(tmp_path, route, *steps)
    assert not answer.finished
    assert (answer.status, charged, state) == (200, charge, CallState.SETTLED)


@pytest.mark.parametrize("route", [CALL, METER])
@pytest.mark.parametrize(
    "script",
    [
        pytest.param((count(),), id="nothing"),
        pytest.param((start(length=4),), id="only a held start"),
        pytest.param((start(length=4), body(b"do", more=True)), id="half of a held answer"),
        pytest.param(({"type": "http.response.pathsend", "path": "/etc/hostname"},), id="path"),
    ],
)
async def test_returning_without_an_answer(tmp_path, route, script):
    """An app that returns before its answer is whole has failed: 500, nothing charged."""
    answer, charged, state = await run(tmp_path, route, *script)
    assert (answer.status, charged, state) == (500, 0, CallState.SETTLED)


@pytest.mark.parametrize("route", [CALL, METER])
@pytest.mark.parametrize(
    "parts",
    [
        pytest.param((body(b"toolong"),), id="more"),
        pytest.param((body(b"toolong", more=True), body()), id="more in parts"),
        pytest.param((body(b"no"),), id="fewer"),
        pytest.param((body(b"n", more=True), body()), id="fewer in parts"),
    ],
)
async def test_a_body_that_contradicts_its_length(tmp_path, route, parts):
    """A short answer that is not as long as it says is broken: nobody gets or pays it."""
    answer, charged, _ = await run(tmp_path, route, start(length=4), *parts)
    assert (answer.status, charged) == (500, 0)


@pytest.mark.parametrize(
    "script", [*SUCCESS, pytest.param((start(length=9000), body()), id="bare")]
)
async def test_head_costs_what_get_costs(tmp_path, script):
    """HEAD runs the same handler for the same price, with a body or with a length alone."""
    answer, charged, _ = await run(tmp_path, CALL, *script, method="HEAD")
    assert answer.finished
    assert charged == 1000


class Shameless:
    """An app that goes on after its errors; `script` is what it sends."""

    def __init__(self, *script: Any) -> None:
        self.script = script

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        for message in self.script:
            with contextlib.suppress(RuntimeError):
                await send(message)


@pytest.mark.parametrize(
    ("script", "status", "charge"),
    [
        pytest.param((start(), body(b"a", more=True), start(500), body()), 200, 100, id="error"),
        pytest.param((body(b"goods"), *WHOLE), 200, 100, id="body first"),
        pytest.param((start(length=9), body(b"a", more=True), *WHOLE), 200, 100, id="two starts"),
        pytest.param((body(b"goods"),), 500, 0, id="only a body"),
    ],
)
async def test_an_answer_in_disorder_is_charged_as_what_goes_out(tmp_path, script, status, charge):
    """No order of messages gets an answer through for nothing, or nothing for the price."""
    async with selling(Shameless(*script), PRICES, tmp_path) as shop:
        answer = await answer_of(shop.pay(shop.payment(METER, target="/meter", cumulative=9000)))
        assert answer.status == status
        assert (await shop.account()).charged == charge
        assert sum("status" in message for message in answer.messages) == 1


async def test_header_fields_may_come_one_by_one(tmp_path):
    """The app's header fields may be any iterable, also one that can be read only once."""
    fields = [(b"content-length", b"4"), (b"x-own", b"1")]
    first = {"type": "http.response.start", "status": 200, "headers": iter(fields)}
    answer, charged, _ = await run(tmp_path, CALL, first, body(b"done"))
    assert (answer.header("x-own"), charged) == ("1", 1000)


async def test_use_above_the_maximum_is_charged_at_the_maximum(tmp_path):
    """Counting more than the maximum is no error: it costs the maximum."""
    _, charged, _ = await run(tmp_path, METER, count(tokens=10**9), *WHOLE)
    assert charged == 8100


async def test_a_sum_of_small_calls_costs_what_one_large_call_does(tmp_path):
    """A session's bill is the exact product of its whole quantity, rounded down once."""
    prices = {METER: PerUnit("token", "0.0000007", max_units=10)}
    async with selling(Handler(count(tokens=1), *WHOLE), prices, tmp_path) as shop:
        for seq in range(1, 21):
            payment = shop.payment(METER, target="/meter", cumulative=1000, seq=seq)
            assert (await shop.pay(payment)).status == 200
        assert (await shop.account()).charged == 14


async def test_a_stream_tells_that_its_figure_is_not_final(tmp_path):
    """A metered stream begins with state open and final false; the figure is asked for later."""
    answer, charged, _ = await run(tmp_path, METER, count(tokens=5), *STREAM)
    paid = answer.paid
    assert paid is not None
    assert paid["extra"]["state"] == "open"
    assert paid["extra"]["final"] is False
    assert (paid["amount"], charged) == ("0", 110)
    assert answer.body == b"ab"


async def test_the_meter_runs_until_the_last_byte_of_a_stream(tmp_path):
    """What a stream counts between its parts is charged, up to its last message."""
    steps = (start(), *[count(tokens=1), body(b"x", more=True)] * 5, count(tokens=7), body(b"y"))
    _, charged, _ = await run(tmp_path, METER, *steps)
    assert charged == 100 + 24


async def test_a_count_after_the_answer_is_an_error_of_the_handler(tmp_path):
    """charge() after the figure is final raises AlreadySettled, and changes no charge."""
    raised = []

    async def late(scope, receive) -> None:
        try:
            scope["state"]["payment"].charge(tokens=1)
        except Exception as error:
            raised.append(type(error).__name__)

    _, charged, _ = await run(tmp_path, METER, count(tokens=5), *WHOLE, late)
    assert (charged, raised) == (110, ["AlreadySettled"])


async def test_a_wrong_unit_fails_the_call(tmp_path):
    """A handler that counts in another unit fails: 500, nothing charged."""
    handler = Handler(count(words=1), *WHOLE)
    async with selling(handler, PRICES, tmp_path) as shop:
        payment = shop.payment(METER, target="/meter", cumulative=10_000)
        with pytest.raises(WrongUnit) as caught:
            await shop.pay(payment)
        assert caught.value.answer.status == 500
        assert (await shop.account()).charged == 0

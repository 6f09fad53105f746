"""The control path: closing a session, receipts, and what became of a call."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.payments import NOW, SESSION
from tests.support.provider import Desk, Handler, Shop, body, count, selling, start, text
from x402mw.core.keys import public_key
from x402mw.core.sessions import SessionState
from x402mw.core.tokens import Receipt, open_receipt
from x402mw.provider import PerCall, PerUnit
from x402mw.provider.journal import JournalUnavailable

pytestmark = pytest.mark.anyio

PATH = "/x402mw/control"
PRICES = {"GET /quote/{symbol}": PerCall("0.001")}


@pytest.fixture
async def shop(tmp_path):
    async with selling(Handler(), PRICES, tmp_path) as found:
        yield found


def receipt(shop: Shop, answer: Any) -> Receipt:
    return open_receipt(json.loads(answer.body)["receipt"], public_key(shop.journal.receipt_seed))


async def test_a_receipt_is_signed_and_cumulative(shop):
    """A receipt verifies under the journal's key and states what was charged so far."""
    await shop.pay(shop.payment())
    answer = await shop.pay(shop.control({"op": "receipt"}, seq=100))
    assert (answer.status, answer.header("cache-control")) == (200, "no-store")
    found = receipt(shop, answer)
    assert (found.charged, found.open, found.final) == (1000, 0, False)
    assert (found.session, found.issued_at) == (SESSION, NOW)


async def test_a_receipt_of_an_unused_session_is_zero(shop):
    """A session that never paid anything has a receipt of 0, and gets no row."""
    found = receipt(shop, await shop.pay(shop.control({"op": "receipt"})))
    assert (found.charged, found.open) == (0, 0)
    assert await shop.journal.account(SESSION) is None


async def test_closing_ends_the_session(shop):
    """Close: the final receipt, nothing more admitted, the rest freed at the escrow."""
    await shop.pay(shop.payment())
    answer = await shop.pay(shop.control({"op": "close"}, seq=100))
    assert answer.status == 200
    assert receipt(shop, answer).final is True
    assert json.loads(answer.body)["charged"] == "1000"
    assert shop.redeemer.closed == [SESSION]
    assert (await shop.account()).state is SessionState.CLOSED
    refused = await shop.pay(shop.payment(seq=8))
    assert (refused.status, refused.problem["code"]) == (402, "session_closing")
    assert refused.paid["extra"]["final"] is True


async def test_closing_again_is_harmless(shop):
    """A repeated close, with the same bytes or a fresh seq, says the same again."""
    payment = shop.control({"op": "close"}, seq=100)
    answers = [await shop.pay(payment) for _ in range(3)]
    answers.append(await shop.pay(shop.control({"op": "close"}, seq=101)))
    assert {one.status for one in answers} == {200}
    assert {receipt(shop, one).charged for one in answers} == {0}
    assert shop.redeemer.closed == [SESSION]


async def test_closing_a_session_never_used_here_ends_it_too(shop):
    """A session first seen by its close takes no calls afterwards."""
    assert (await shop.pay(shop.control({"op": "close"}, seq=100))).status == 200
    assert (await shop.pay(shop.payment())).status == 402


async def test_closing_waits_for_calls_that_run(tmp_path):
    """Close while a call runs: 202 with Retry-After and no new calls, then 200."""
    entered, go = asyncio.Event(), asyncio.Event()

    async def slow(scope, receive) -> None:
        entered.set()
        await go.wait()

    async with selling(Handler(slow, *text()), PRICES, tmp_path) as shop:
        running = asyncio.create_task(shop.pay(shop.payment()))
        await entered.wait()
        answer = await shop.pay(shop.control({"op": "close"}, seq=100))
        assert (answer.status, answer.header("retry-after")) == (202, "1")
        assert receipt(shop, answer).final is False
        assert json.loads(answer.body)["open"] == "1000"
        assert shop.redeemer.closed == []
        assert (await shop.pay(shop.payment(seq=8))).status == 402
        go.set()
        assert (await running).status == 200
        answer = await shop.pay(shop.control({"op": "close"}, seq=101))
        assert (answer.status, receipt(shop, answer).charged) == (200, 1000)
        assert receipt(shop, answer).final is True


async def test_closing_while_the_escrow_is_away(shop):
    """Close that the escrow cannot confirm now: 202, and later 200."""
    shop.redeemer.works = False
    answer = await shop.pay(shop.control({"op": "close"}, seq=100))
    assert (answer.status, answer.header("retry-after")) == (202, "5")
    assert receipt(shop, answer).final is False
    shop.redeemer.works = True
    assert (await shop.pay(shop.control({"op": "close"}, seq=101))).status == 200


async def test_it_works_with_an_expired_token(shop):
    """Times do not bind the control path: an expired token and voucher still close."""
    await shop.pay(shop.payment())
    shop.clock.now = NOW + 100_000
    payment = shop.control({"op": "close"}, seq=100)
    assert (await shop.pay(payment)).status == 200


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (text(), {"state": "settled", "charge": "30", "final": True}),
        (text("no", 404), {"state": "settled", "charge": "0", "final": True}),
        ((start(), body(b"x")), {"state": "settled", "charge": "30", "final": True}),
    ],
)
async def test_it_tells_what_became_of_a_call(tmp_path, script, expected):
    """`receipt` with a seq tells state and charge of that call; of an unknown one "refused"."""
    prices = {"GET /quote/{symbol}": PerUnit("token", "0.00001", max_units=10)}
    async with selling(Handler(count(tokens=3), *script), prices, tmp_path) as shop:
        await shop.pay(shop.payment(cumulative=1000))
        answer = await shop.pay(shop.control({"op": "receipt", "seq": "7"}, seq=100))
        assert json.loads(answer.body)["seq"] == expected
        answer = await shop.pay(shop.control({"op": "receipt", "seq": "9"}, seq=100))
        assert json.loads(answer.body)["seq"] == {
            "state": "refused",
            "charge": "0",
            "final": False,
        }


@pytest.mark.parametrize(
    ("when", "state"), [((start(),), "open"), ((start(length=4),), "running"), ((), "running")]
)
async def test_it_tells_of_a_call_that_runs(tmp_path, when, state):
    """A call whose answer has begun is open, before that it is running."""
    seen: list[Any] = []

    async def ask(scope, receive) -> None:
        answer = await shop.pay(shop.control({"op": "receipt", "seq": "7"}, seq=100))
        seen.append(json.loads(answer.body)["seq"])

    prices = {"GET /quote/{symbol}": PerUnit("token", "0.00001", max_units=10)}
    rest = (body(b"done"),) if when else text()
    async with selling(Handler(*when, ask, *rest), prices, tmp_path) as shop:
        assert (await shop.pay(shop.payment())).status == 200
        assert seen == [{"state": state, "charge": "0", "final": False}]


async def test_priced_terms_do_not_control(shop):
    """The control path takes control terms only."""
    payment = shop.payment(method="POST", target=PATH, body=b'{"op":"close"}')
    answer = await shop.pay(payment)
    assert (answer.status, answer.problem["code"]) == (400, "control_terms")


async def test_without_payment_it_is_malformed(shop):
    """The control path without a payment header is 400; other methods are 405."""
    assert (await shop.call("POST", PATH)).status == 400
    for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS"):
        answer = await shop.call(method, PATH)
        assert (answer.status, answer.header("allow")) == (405, "POST")


async def test_a_moved_control_voucher_is_refused(shop):
    """A control voucher is bound to its body: a receipt request cannot close."""
    payment = shop.control({"op": "receipt"})
    answer = await shop.pay(payment, body=b'{"op":"close"}')
    assert (answer.status, answer.problem["code"]) == (400, "request_binding")
    assert (await shop.account()).state is SessionState.OPEN


async def test_a_body_over_the_limit(shop):
    """Control bodies are small: a longer one is 413, with the seq in the header."""
    answer = await shop.pay(shop.control(b" " * 5000))
    assert answer.status == 413
    assert answer.paid["extra"]["seq"] == "7"


async def test_control_calls_are_counted(tmp_path):
    """After its share a session is told to wait: 429 with Retry-After."""
    desk = Desk(tmp_path / "j.db", per_minute=2)
    async with selling(Handler(), PRICES, tmp_path, desk=desk) as shop:
        ask = [await shop.pay(shop.control({"op": "receipt"})) for _ in range(3)]
        assert [one.status for one in ask] == [200, 200, 429]
        assert ask[2].header("retry-after") == "60"


async def test_asking_what_a_stream_cost_is_free(tmp_path):
    """An answer that went out without its figure earns the question for it."""
    desk = Desk(tmp_path / "j.db", per_minute=2)
    app = Handler(start(), count(tokens=3), body(b"x"))
    prices = {"GET /quote/{symbol}": PerUnit("token", "0.001", max_units=3)}
    async with selling(app, prices, tmp_path, desk=desk) as shop:
        for seq in range(1, 6):
            paid = shop.payment(seq=seq, cumulative=3000 * seq)
            assert (await shop.pay(paid)).paid["extra"]["state"] == "open"
            asking = shop.control({"op": "receipt", "seq": str(seq)}, seq=100 + seq)
            answer = await shop.pay(asking)
            assert answer.status == 200
            assert json.loads(answer.body)["seq"]["charge"] == "3000"


async def test_a_journal_that_fails(shop):
    """Control while the journal fails: 503 with Retry-After."""

    async def failing(*args: Any, **more: Any) -> Any:
        raise JournalUnavailable("disk full")

    shop.journal.begin_close = failing
    answer = await shop.pay(shop.control({"op": "close"}))
    assert (answer.status, answer.header("retry-after")) == (503, "5")


JUNK = st.one_of(
    st.binary(max_size=60),
    st.dictionaries(
        st.sampled_from(["op", "seq", "x"]),
        st.one_of(
            st.sampled_from(["close", "receipt", "extend", "7", "-1", "07", "9" * 19, "9" * 25]),
            st.integers(),
            st.none(),
            st.booleans(),
            st.lists(st.integers(), max_size=2),
        ),
    ),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(content=JUNK)
async def test_junk_is_4xx(shop, content):
    """Whatever the body of a control request is: an answer, or 4xx; never 5xx."""
    answer = await shop.pay(shop.control(content))
    assert answer.status in (200, 400)

"""What a provider tells its operator: one record for each event, and figures that add up."""

import logging
from typing import Any

import pytest

from tests.support.figures import Broken, Figures
from tests.support.payments import PAYER as PAYER
from tests.support.provider import Desk, Handler, answer_of, selling, text
from x402mw.core.amounts import atomic
from x402mw.provider import PerCall
from x402mw.provider.events import CLOSED_REMEMBERED_MAX, Events
from x402mw.provider.journal import JournalUnavailable

pytestmark = pytest.mark.anyio

PRICES = {"GET /quote/{symbol}": PerCall("0.001")}
ROUTE = "GET /quote/{symbol}"


@pytest.fixture
def figures():
    return Figures()


@pytest.fixture
def desk(tmp_path, figures):
    return Desk(tmp_path / "journal.db", telemetry=figures)


def told(caplog: Any) -> list[str]:
    """The events of the records so far, in order; every record has one."""
    found = [getattr(record, "event", record.getMessage()) for record in caplog.records]
    caplog.clear()
    return [event for event in found if isinstance(event, str)]


@pytest.fixture(autouse=True)
def _hear_all(caplog):
    caplog.set_level(logging.DEBUG, "x402mw")


async def test_every_outcome_of_a_request_is_counted_once(desk, figures, tmp_path, caplog):
    """Challenged, paid, replayed and refused; the self-test of the start is none of them."""
    async with selling(Handler(), PRICES, tmp_path, desk=desk) as shop:
        assert figures.sums == {}
        await shop.call("GET", "/quote/x")
        payment = shop.payment()
        for _ in range(3):
            assert (await shop.pay(payment)).status == 200
        await shop.call("GET", "/quote/x", [(b"payment-signature", b"junk")])
        requests = {key[2]: count for key, count in figures.sums.items() if "requests" in key[0]}
        assert requests == {"challenged": 1, "paid": 1, "replayed": 2, "refused": 1}
        assert {key[1] for key in figures.sums} == {ROUTE}
        assert figures.sums["provider.charged", ROUTE, "USDC"] == 1000
        assert figures.sums["provider.refusals", ROUTE, "malformed"] == 1
        counts = {key[0]: len(found) for key, found in figures.durations.items()}
        assert counts["provider.handler.duration"] == 1
        assert len(figures.durations["provider.journal.duration", "admit"]) == 1
        assert len(figures.durations["provider.journal.duration", "settle"]) == 1
    assert told(caplog) == ["session_first_seen", "charged", "replayed", "replayed", "refused"]


async def test_what_falls_under_no_price_is_counted_without_its_path(desk, figures, tmp_path):
    """Wrong methods, odd spellings and payments for free paths: by reason, never by path."""
    async with selling(Handler(), PRICES, tmp_path, desk=desk) as shop:
        await shop.call("POST", "/quote/x")
        await shop.call("GET", "/QUOTE/x")
        await shop.call("GET", "/free", [(b"payment-signature", b"junk")])
        await shop.call("GET", "/free")
    assert figures.sums == {
        ("provider.requests", "-", "refused"): 3,
        ("provider.refusals", "-", "method"): 1,
        ("provider.refusals", "-", "not_found"): 1,
        ("provider.refusals", "-", "not_priced"): 1,
    }


async def test_gauges_tell_how_things_stand_until_the_stop(desk, figures, tmp_path):
    """Open calls, value not yet redeemed, lag and the escrow's absence; nothing after the stop."""
    seen: list[dict[str, float]] = []

    async def look(scope: Any, receive: Any) -> None:
        seen.append(figures.read())

    async with selling(Handler(look, *text()), PRICES, tmp_path, desk=desk) as shop:
        await shop.pay(shop.payment())
        assert seen[0]["provider.open_calls"] == 1
        shop.link.away = True
        shop.redeemer.lag = 12.5
        assert figures.read() == {
            "provider.open_calls": 0,
            "provider.unredeemed": 1000,
            "provider.redemption.lag": 12.5,
            "provider.escrow_away": 1,
        }
    assert figures.read() == {}


async def test_figures_that_fail_cost_no_call(tmp_path, caplog):
    """A telemetry that raises is told once, and every call is served and charged as ever."""
    desk = Desk(tmp_path / "journal.db", telemetry=Broken())
    async with selling(Handler(), PRICES, tmp_path, desk=desk) as shop:
        assert (await shop.call("GET", "/quote/x")).status == 402
        assert (await shop.pay(shop.payment())).status == 200
        assert (await shop.account()).charged == 1000
    assert told(caplog) == ["telemetry_failed", "session_first_seen", "charged"]


async def test_a_session_that_closes_is_told(desk, tmp_path, caplog):
    """Its first call and the buyer's wish to close it are one record each."""
    async with selling(Handler(), PRICES, tmp_path, desk=desk) as shop:
        await shop.pay(shop.payment())
        assert (await shop.pay(shop.control({"op": "close"}, seq=9))).status == 200
    assert told(caplog) == ["session_first_seen", "charged", "session_closing"]


async def test_a_handler_that_is_stopped_is_told(desk, tmp_path, caplog, monkeypatch):
    """An unavailable journal is told once, and again when it is back."""
    async with selling(Handler(), PRICES, tmp_path, desk=desk) as shop:
        admit = shop.journal.admit

        async def failing(*args: Any, **more: Any) -> Any:
            raise JournalUnavailable("disk full")

        monkeypatch.setattr(type(shop.journal), "admit", failing)
        for seq in (1, 2):
            assert (await answer_of(shop.pay(shop.payment(seq=seq)))).status == 503
        monkeypatch.setattr(type(shop.journal), "admit", lambda self, *a, **m: admit(*a, **m))
        assert (await shop.pay(shop.payment(seq=3))).status == 200
    wanted = ["journal_unavailable", "refused", "refused", "journal_back", "session_first_seen"]
    assert told(caplog) == [*wanted, "charged"]


def test_a_closed_session_is_told_once(caplog):
    """The escrow tells of an end in its verdict and in its changes; the log tells it once."""
    events = Events()
    for session in (b"a" * 16, b"b" * 16, b"a" * 16):
        events.closed(session, atomic(1000))
    assert told(caplog) == ["session_closed"] * 2
    for number in range(CLOSED_REMEMBERED_MAX):
        events.closed(number.to_bytes(16, "big"), atomic(1))
    assert len(events._closed) == CLOSED_REMEMBERED_MAX


def test_the_escrow_is_away_once_until_it_is_back(caplog):
    """A day without the escrow is one record when it goes and one when it returns."""
    events = Events()
    for _ in range(3):
        events.escrow_away(TimeoutError())
    for _ in range(3):
        events.escrow_back()
    assert told(caplog) == ["escrow_away", "escrow_back"]

"""What a wallet tells its owner: one record for each event, and figures that add up."""

import logging
from typing import Any

import httpx
import pytest

from tests.client.world import World
from tests.support.figures import Broken, Figures
from x402mw.core.errors import LimitExceeded, PaymentOutcomeUnknown
from x402mw_client import Limits

pytestmark = pytest.mark.anyio


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Any:
    """The events so far, with their reasons."""
    caplog.set_level(logging.DEBUG, "x402mw.client")

    def look() -> list[str]:
        found = [vars(record) for record in caplog.records if record.name == "x402mw.client"]
        caplog.clear()
        return [" ".join([one["event"], *filter(None, [one.get("reason")])]) for one in found]

    return look


async def test_a_life_of_a_wallet(world: World, told: Any) -> None:
    """Opened, paid, closed: each is one record, and the sums are those of the books."""
    figures = Figures()
    world.connect(telemetry=figures)
    await world.get("/item/a")
    await world.get("/item/b")
    await world.close()
    assert told() == ["session_opened", "paid", "paid", "session_closed"]
    assert figures.sums == {
        ("client.sessions",): 1,
        ("client.locked", "USDC"): 100_000,
        ("client.calls", "paid"): 2,
        ("client.spent", "USDC"): 2000,
    }


async def test_a_call_that_is_not_paid(world: World, told: Any) -> None:
    """A limit that was reached is told with its name, and counted with its code."""
    figures = Figures()
    world.connect(Limits(per_request="0.0001", total="1.00"), telemetry=figures)
    with pytest.raises(LimitExceeded):
        await world.get("/item/a")
    assert told() == ["limit_reached per_request"]
    assert figures.sums == {("client.calls", "limit_exceeded"): 1}


async def test_an_answer_that_is_lost(world: World, told: Any) -> None:
    """Each sending again is one record; losing the answer for good is a warning."""
    figures = Figures()
    world.connect(telemetry=figures)
    await world.get("/item/a")
    told()
    answer = world.provider

    def lose(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("lost", request=request)

    world.transport._driver._inner = httpx.MockTransport(lose)
    with pytest.raises(PaymentOutcomeUnknown) as unknown:
        await world.get("/item/b")
    assert told() == [*["payment_resent"] * 3, "outcome_unknown payment_outcome_unknown"]
    assert figures.sums["client.retries",] == 3
    assert figures.sums["client.calls", "payment_outcome_unknown"] == 1
    world.transport._driver._inner = httpx.MockTransport(answer)
    assert (await world.resume(unknown.value.handle)).status_code == 200
    assert told() == ["paid"]


async def test_figures_that_fail_cost_no_payment(world: World, told: Any) -> None:
    """A telemetry that raises is told once, and the wallet pays as ever."""
    world.connect(telemetry=Broken())
    assert (await world.get("/item/a")).status_code == 200
    assert told() == ["telemetry_failed", "session_opened", "paid"]
    assert world.money() == (1000, 0)

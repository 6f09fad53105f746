"""Figures arrive in the real OpenTelemetry SDK as they were meant."""

from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from tests.support.provider import Desk, Handler, selling
from x402mw.core.telemetry import OPEN_CALLS, UNREDEEMED
from x402mw.provider import PerCall
from x402mw.telemetry.opentelemetry import SECONDS_BOUNDARIES, OpenTelemetry

pytestmark = pytest.mark.anyio

ROUTE = "GET /quote/{symbol}"


class Collected:
    """A meter provider in memory, and what it collects."""

    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.provider = MeterProvider([self.reader], shutdown_on_exit=False)

    def metrics(self) -> dict[str, Any]:
        """Every metric by name, as of now."""
        data = self.reader.get_metrics_data()
        if data is None:
            return {}
        (resource,) = data.resource_metrics
        (scope,) = resource.scope_metrics
        assert scope.scope.name == "x402mw"
        return {metric.name: metric for metric in scope.metrics}

    def values(self, name: str) -> dict[tuple[str, ...], Any]:
        """The points of a metric by the values of their attributes."""
        metric = self.metrics().get(name)
        points = metric.data.data_points if metric else []
        return {
            tuple(point.attributes.values()): getattr(point, "value", None) or point
            for point in points
        }


@pytest.fixture
def collected():
    found = Collected()
    yield found
    found.provider.shutdown()


async def test_a_providers_figures_arrive(tmp_path, collected):
    """Counters, histograms and gauges of a real run, with units and few labels."""
    desk = Desk(tmp_path / "journal.db", telemetry=OpenTelemetry(collected.provider))
    prices = {ROUTE: PerCall("0.001")}
    async with selling(Handler(), prices, tmp_path, desk=desk) as shop:
        await shop.call("GET", "/quote/x")
        for seq in (1, 2):
            assert (await shop.pay(shop.payment(seq=seq, cumulative=5000))).status == 200
        requests = collected.values("x402mw.provider.requests")
        assert requests == {(ROUTE, "challenged"): 1, (ROUTE, "paid"): 2}
        assert collected.values("x402mw.provider.charged") == {(ROUTE, "USDC"): 2000}
        assert collected.values("x402mw.provider.unredeemed") == {(): 2000}
        (handler,) = collected.values("x402mw.provider.handler.duration").values()
        assert handler.count == 2
        assert handler.explicit_bounds == SECONDS_BOUNDARIES
        waits = collected.values("x402mw.provider.journal.duration")
        assert {key: point.count for key, point in waits.items()} == {("admit",): 2, ("settle",): 2}
        units = {name: metric.unit for name, metric in collected.metrics().items()}
        assert units["x402mw.provider.charged"] == "{USDC units}"
        assert units["x402mw.provider.handler.duration"] == "s"
    assert collected.values("x402mw.provider.unredeemed") == {}


def test_gauges_of_several_watchers(collected):
    """Two watch one thing and one of them ends: what the other reads is still observed."""
    telemetry = OpenTelemetry(collected.provider)
    first = telemetry.watch(OPEN_CALLS, lambda: 3)
    second = telemetry.watch(OPEN_CALLS, lambda: 4)
    telemetry.watch(UNREDEEMED, lambda: 2**53)
    first()
    first()
    assert collected.values("x402mw.provider.open_calls") == {(): 4}
    assert collected.values("x402mw.provider.unredeemed") == {(): 2**53}
    second()
    assert collected.values("x402mw.provider.open_calls") == {}


def test_without_an_sdk_nothing_happens():
    """With the API alone every figure goes nowhere, and nothing fails."""
    telemetry = OpenTelemetry()
    telemetry.watch(OPEN_CALLS, lambda: 1)()

"""The price list: what it refuses, so that no mistake becomes a free or a wrong price."""

import pytest

from x402mw.core.errors import ConfigurationError
from x402mw.core.routes import Miss
from x402mw.provider import FREE, PerCall, PerUnit, Priced
from x402mw.provider.prices import PricedRoute, price_table, read_prices, shape

ONE = PerCall("0.001")


@pytest.mark.parametrize(
    ("prices", "message"),
    [
        ({}, "prices nothing"),
        ({"GET /": FREE}, "prices nothing"),
        ({"/quote": ONE}, "a route is written like"),
        ({"GET quote": ONE}, "a route is written like|starts with a slash"),
        ({"GET /q/{a:odd}": ONE}, "unknown or repeated"),
        ({"GET /q": "0.001"}, "written like PerCall"),
        ({"GET /q": None}, "written like PerCall"),
        ({"GET /q": 0.001}, "written like PerCall"),
        ({"GET /q": PerCall(0.001)}, "no amount"),
        ({"GET /q": PerCall("0,001")}, "no amount"),
        ({"GET /q": PerCall("")}, "no amount"),
        ({"GET /q": PerCall("-1")}, "no amount"),
        ({"GET /q": PerCall("0.0000001")}, "no amount"),
        ({"GET /q": PerCall("0")}, "costs nothing"),
        ({"GET /q": PerUnit("token", "0", max_units=1)}, "costs nothing"),
        ({"GET /q": PerUnit("token", "0.1")}, "max_units"),
        ({"GET /q": PerUnit("to ken", "0.1", max_units=1)}, "a unit is"),
        ({"GET /q": ONE, "HEAD /q": ONE}, "priced twice"),
        ({"GET /q/{a}": ONE, "GET /q/{b}": ONE}, "priced twice"),
        ({"GET /q/{a}": ONE, "GET /q/{b:str}": FREE}, "priced twice"),
        ({"GET /q": Priced(ONE, timeout_seconds=0)}, "timeout_seconds"),
        ({"GET /q": Priced(ONE, timeout_seconds=1.5)}, "timeout_seconds"),
        ({"GET /q": Priced(ONE, timeout_seconds=True)}, "timeout_seconds"),
        ({"GET /q": Priced(ONE, timeout_seconds=3601)}, "timeout_seconds"),
        ({"GET /q": Priced(ONE, body_bytes_max=-1)}, "body_bytes_max"),
        ({"GET /q": Priced(ONE, also_charge=(200,))}, "also_charge"),
        ({"GET /q": Priced(ONE, also_charge=("404",))}, "also_charge"),
        ({"GET /q": Priced(ONE, description="x" * 501)}, "description"),
    ],
)
def test_a_mistake_is_named(prices, message):
    """Every mistake in a price list is a ConfigurationError that says what is wrong."""
    with pytest.raises(ConfigurationError, match=message):
        read_prices(prices)


def test_options_reach_the_route():
    """A bare plan has the defaults; HEAD is read as GET."""
    routes = read_prices({"HEAD /q": ONE, "POST /q": FREE})
    found = routes["GET", "/q"]
    assert isinstance(found, PricedRoute)
    assert (found.price.amount, found.options.timeout_seconds, found.binding) == (1000, 60, 0)
    assert routes["POST", "/q"] is FREE


@pytest.mark.parametrize(
    ("status", "charged"), [(199, False), (200, True), (304, True), (399, True), (400, False)]
)
def test_success_is_charged(status, charged):
    """2xx and 3xx are charged, nothing else unless it is listed."""
    route = read_prices({"GET /q": Priced(ONE, also_charge=(402,))})["GET", "/q"]
    assert isinstance(route, PricedRoute)
    assert route.charges(status) is charged
    assert route.charges(402)


def test_shape_leaves_out_names():
    """Two templates match the same exactly if they differ in names only."""
    assert shape("/a/{x}/{y:path}") == shape("/a/{long_name:str}/{z:path}")
    assert shape("/a/{x}") != shape("/a/{x:int}")


def test_the_order_of_the_router_wins():
    """The table asks in the order in which the app's router does; the rest keeps its place."""
    routes = read_prices({"GET /q/{s}": ONE, "GET /q/free": FREE})
    assert price_table(routes).find("GET", "/q/free") is routes["GET", "/q/{s}"]
    table = price_table(routes, [("GET", "/q/free")])
    assert table.find("GET", "/q/free") is FREE
    assert table.find("POST", "/q/free") is Miss.METHOD

"""Start-up checks: a price list that does not fit its app stops the start.

Failing open is the one thing a payment layer must not do, so every line of the list must match a
route of the app, and no method of a priced path may be left without a word. Apps that do not show
their routes skip this; at run time an unpriced method of a priced path is refused all the same.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from starlette.routing import BaseRoute, Match

from x402mw.core.errors import ConfigurationError
from x402mw.core.pricing import Free
from x402mw.core.routes import priced_method, sample_path
from x402mw.provider.prices import PricedRoute

CLAIM_MARGIN_SECONDS = 180

Routes = Mapping[tuple[str, str], PricedRoute | Free]


def find_routes(app: Any) -> list[BaseRoute] | None:
    """Returns the app's routes, looking through other middleware, or None if it shows none."""
    for _ in range(32):
        routes = getattr(app, "routes", None)
        if isinstance(routes, list):
            return routes
        app = getattr(app, "app", None)
        if app is None:
            return None
    return None


def check_routes(prices: Routes, routes: Iterable[BaseRoute]) -> list[tuple[str, str]]:
    """Checks the list against the app's routes and returns its keys in the router's order.

    Raises `ConfigurationError` for a price that matches no route, and for a method of a priced path
    that is neither priced nor marked `FREE`.
    """
    found: list[tuple[int, tuple[str, str]]] = []
    flat = list(_leaves(routes))
    for key in prices:
        places = [place for place, (route, path) in enumerate(flat) if _matches(route, path, key)]
        if not places:
            raise ConfigurationError(f"the price of {' '.join(key)!r} matches no route of the app")
        found.append((places[0], key))
        for place in places:
            _check_methods(prices, key, getattr(flat[place][0], "methods", None))
    return [key for _, key in sorted(found, key=lambda pair: pair[0])]


def _leaves(routes: Iterable[BaseRoute], prefix: str = "") -> Iterator[tuple[BaseRoute, str]]:
    """Yields every route that ends somewhere, with the path prefix it is mounted under."""
    for route in routes:
        children = getattr(route, "routes", None)
        if children:
            yield from _leaves(children, prefix + getattr(route, "path", ""))
        else:
            yield route, prefix


def _matches(route: BaseRoute, prefix: str, key: tuple[str, str]) -> bool:
    method, template = key
    path = sample_path(template)
    if not path.startswith(prefix):
        return False
    scope = {"type": "http", "method": method, "path": path, "root_path": prefix, "headers": []}
    match, _ = route.matches(scope)
    return match is Match.FULL


def _check_methods(prices: Routes, key: tuple[str, str], methods: Iterable[str] | None) -> None:
    template = key[1]
    for method in methods or ():
        if (priced_method(method), template) not in prices:
            raise ConfigurationError(
                f"{method} {template} has no price although {key[0]} has one; "
                f'price it, or mark it: "{method} {template}": FREE'
            )


def check_times(prices: Routes, *, claim_seconds: int, redeem_seconds: int) -> None:
    """Checks that the escrow's claim window outlasts the longest call and its redemption."""
    longest = max(
        route.options.timeout_seconds for route in prices.values() if isinstance(route, PricedRoute)
    )
    needed = longest + redeem_seconds + CLAIM_MARGIN_SECONDS
    if claim_seconds < needed:
        raise ConfigurationError(
            f"calls of up to {longest} s need a claim window of {needed} s; "
            f"this escrow's is {claim_seconds} s"
        )

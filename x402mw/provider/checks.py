"""Start-up checks: a price list that does not fit its app stops the start.

Failing open is the one thing a payment layer must not do, so every line of the list must match a
route of the app, and no method of a priced path may be left without a word. Apps that do not show
their routes skip this; at run time an unpriced method of a priced path is refused all the same.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.routing import BaseRoute, Match

from x402mw.core.errors import ConfigurationError
from x402mw.core.pricing import Free
from x402mw.core.routes import priced_method, sample_path
from x402mw.provider.decorator import Entry, class_methods, find_price
from x402mw.provider.prices import PricedRoute, PriceList, shape

CLAIM_MARGIN_SECONDS = 180
LAYERS_MAX = 32
_PLAIN_PATH = re.compile(r"/|(?:/[A-Za-z0-9._~-]+)+", re.ASCII)

Routes = Mapping[tuple[str, str], PricedRoute | Free]


def find_routes(app: Any) -> list[BaseRoute] | None:
    """Returns the app's routes, looking through other middleware, or None if it shows none."""
    for layer in _layers(app):
        routes = getattr(layer, "routes", None)
        if isinstance(routes, list):
            return routes
    return None


def find_root_path(app: Any) -> str | None:
    """Returns the root path by which the app overrides the server's, as FastAPI can; else None."""
    roots = (getattr(layer, "root_path", None) for layer in _layers(app))
    return next((root for root in roots if isinstance(root, str) and root), None)


def _layers(app: Any) -> Iterator[Any]:
    """The app, and what stands behind it as long as each layer calls the next one `app`."""
    for _ in range(LAYERS_MAX):
        if app is None:
            return
        yield app
        app = getattr(app, "app", None)


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A route that ends somewhere, and the path prefix under which it is mounted."""

    route: Any
    prefix: str

    @property
    def methods(self) -> Iterable[str]:
        """The methods it says it takes."""
        return getattr(self.route, "methods", None) or class_methods(self.endpoint)

    @property
    def endpoint(self) -> Any:
        """What runs, if it shows that."""
        return getattr(self.route, "endpoint", None)

    @property
    def template(self) -> str | None:
        """Its own path template; None for what is mounted without showing its routes."""
        path = getattr(self.route, "path", None)
        return self.prefix + path if path and self.methods else None

    def match(self, method: str, template: str) -> Match:
        """How the app's router would judge a path that the template matches."""
        try:
            path, root = sample_path(template), sample_path(self.prefix)
        except KeyError:
            # A mount below a parameter of the app's own kind: no price can name it.
            return Match.NONE
        if not path.startswith(root):
            return Match.NONE
        scope = {"type": "http", "method": method, "path": path, "root_path": root, "headers": []}
        found: Match = self.route.matches(scope)[0]
        return found


def join_prices(prices: PriceList, routes: Iterable[BaseRoute]) -> dict[str, Entry]:
    """Adds the prices that stand beside handlers (`@priced`, `@free`) to a list of prices.

    Raises `ConfigurationError` for a route that has both, or whose two handlers differ.
    """
    joined = dict(prices)
    for leaf in _leaves(routes):
        for method in leaf.methods or ("",):
            entry = find_price(leaf.endpoint, method)
            if entry is None:
                continue
            if leaf.template is None:
                raise ConfigurationError(f"{leaf.route!r} has a price but is no HTTP route")
            text = f"{priced_method(method)} {leaf.template}"
            if joined.setdefault(text, entry) is not entry:
                raise ConfigurationError(f"{text!r} is priced twice, once beside its handler")
    return joined


def check_routes(prices: Routes, routes: Iterable[BaseRoute]) -> list[tuple[str, str]]:
    """Checks the list against the app's routes and returns its keys in the router's order.

    Raises `ConfigurationError` for a price that matches no route, for a method of a priced path
    that is neither priced nor marked `FREE`, and for a price that covers only part of its route.
    """
    leaves = list(_leaves(routes))
    known = {(method, shape(template)) for method, template in prices}
    places = {key: _check_key(key, prices[key], leaves, known) for key in prices}
    return sorted(places, key=lambda key: places[key])


def _check_key(
    key: tuple[str, str],
    entry: PricedRoute | Free,
    leaves: list[_Leaf],
    known: Collection[tuple[str, str]],
) -> int:
    """Checks one line, and returns the place of the first route that serves it."""
    matches = [leaf.match(*key) for leaf in leaves]
    full = [place for place, match in enumerate(matches) if match is Match.FULL]
    if not full:
        raise ConfigurationError(f"the price of {' '.join(key)!r} matches no route of the app")
    if isinstance(entry, PricedRoute):
        for leaf, match in zip(leaves, matches, strict=True):
            if match is not Match.NONE:
                _check_methods(key, leaf.methods, known)
        _check_whole(key, [leaves[place].template for place in full], known)
    return full[0]


def _check_methods(
    key: tuple[str, str], methods: Iterable[str], known: Collection[tuple[str, str]]
) -> None:
    template = key[1]
    for method in sorted(methods):
        if (priced_method(method), shape(template)) not in known:
            raise ConfigurationError(
                f"{method} {template} has no price although {key[0]} has one; "
                f'price it, or mark it: "{method} {template}": FREE'
            )


def _check_whole(
    key: tuple[str, str], templates: Iterable[str | None], known: Collection[tuple[str, str]]
) -> None:
    """Checks that the routes which serve a priced path have no paths without a word."""
    method, template = key
    for own in templates:
        if own is not None and (method, shape(own)) not in known:
            raise ConfigurationError(
                f"{method} {template} covers only a part of the route {own}; "
                f'price the rest of it, or mark it: "{method} {own}": FREE'
            )
        if own is None or shape(own) == shape(template):
            return


def _leaves(routes: Iterable[Any], prefix: str = "") -> Iterator[_Leaf]:
    for route in routes:
        included = getattr(route, "effective_candidates", None)
        if included is not None:
            # A router that FastAPI includes: its candidates carry their full paths.
            yield from _leaves([getattr(one, "starlette_route", None) or one for one in included()])
        elif children := getattr(route, "routes", None):
            yield from _leaves(children, prefix + getattr(route, "path", ""))
        else:
            yield _Leaf(route, prefix)


def check_paths(path_prefix: str, control: str) -> None:
    """Checks the prefix and the control path, which buyers append to an origin."""
    for name, path in (("path_prefix", path_prefix or "/"), ("control_path", control)):
        if not _PLAIN_PATH.fullmatch(path):
            raise ConfigurationError(f'{name} is a plain path such as "/api", not {path!r}')


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

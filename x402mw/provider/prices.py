"""The price list of a provider: which requests cost what, and under which options.

prices = {
    "GET /quote/{symbol}": PerCall("0.001"),
    "POST /summarize": Priced(PerUnit("token", "0.002", per=1000, max_units=4000),
                              timeout_seconds=120),
    "GET /summarize": FREE,
}
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from x402mw.core.errors import ConfigurationError
from x402mw.core.pricing import FREE, Free, Plan, Price, read_plan
from x402mw.core.routes import RouteTable, parse_route
from x402mw.core.vouchers import BIND_BODY, BIND_REQUEST

TIMEOUT_SECONDS = 60
TIMEOUT_SECONDS_MAX = 3600
BODY_BYTES_MAX = 10 * 1024 * 1024
STORED_BODY_BYTES_MAX = 16 * 1024
DESCRIPTION_CHARACTERS_MAX = 500
_PARAMETER = re.compile(r"{\w+(:\w+)?}")


@dataclass(frozen=True, slots=True)
class Priced:
    """A plan with options for its route.

    `timeout_seconds` is the longest a call may take. `unbound_body` lets a buyer leave its request
    body out of the signature, for uploads too large to hash first. `store_body=False` keeps no
    answers for retries. `also_charge` lists statuses of 400 and more that are charged as well.
    """

    plan: Plan
    timeout_seconds: int = TIMEOUT_SECONDS
    unbound_body: bool = False
    store_body: bool = True
    body_bytes_max: int = BODY_BYTES_MAX
    also_charge: tuple[int, ...] = ()
    description: str = ""


PriceList = Mapping[str, Plan | Priced | Free]


@dataclass(frozen=True, slots=True)
class PricedRoute:
    """One line of the price list, checked and in atomic units."""

    method: str
    template: str
    price: Price
    options: Priced

    @property
    def binding(self) -> int:
        """The loosest binding this route allows."""
        return BIND_REQUEST if self.options.unbound_body else BIND_BODY

    def charges(self, status: int) -> bool:
        """Tells whether an answer of this status is paid for: the charge table."""
        return 200 <= status < 400 or status in self.options.also_charge


def read_prices(prices: PriceList) -> dict[tuple[str, str], PricedRoute | Free]:
    """Checks a price list; raises `ConfigurationError` naming the line that is wrong."""
    routes: dict[tuple[str, str], PricedRoute | Free] = {}
    shapes: set[tuple[str, str]] = set()
    for text, entry in prices.items():
        method, template = parse_route(text)
        if (method, shape(template)) in shapes:
            raise ConfigurationError(f"{text!r} is priced twice (HEAD has the price of GET)")
        shapes.add((method, shape(template)))
        try:
            routes[method, template] = _read_entry(method, template, entry)
        except ConfigurationError as error:
            raise ConfigurationError(f"{text!r}: {error}") from None
    if not any(isinstance(route, PricedRoute) for route in routes.values()):
        raise ConfigurationError("the price list prices nothing")
    return routes


def _read_entry(method: str, template: str, entry: Plan | Priced | Free) -> PricedRoute | Free:
    if entry is FREE:
        return FREE
    options = entry if isinstance(entry, Priced) else Priced(entry)
    if not isinstance(options.plan, Plan):
        raise ConfigurationError(f'a price is written like PerCall("0.001"), not {options.plan!r}')
    _check_options(options)
    return PricedRoute(method, template, read_plan(options.plan), options)


def _check_options(options: Priced) -> None:
    if not _is_count(options.timeout_seconds, TIMEOUT_SECONDS_MAX):
        raise ConfigurationError(
            f"timeout_seconds is a whole number between 1 and {TIMEOUT_SECONDS_MAX}"
        )
    if not _is_count(options.body_bytes_max, 2**63):
        raise ConfigurationError("body_bytes_max is a whole number above 0")
    if not all(type(status) is int and 400 <= status <= 599 for status in options.also_charge):
        raise ConfigurationError("also_charge lists statuses between 400 and 599")
    if len(options.description) > DESCRIPTION_CHARACTERS_MAX:
        raise ConfigurationError(
            f"a description has at most {DESCRIPTION_CHARACTERS_MAX} characters"
        )


def _is_count(value: object, most: int) -> bool:
    return type(value) is int and 0 < value <= most


def shape(template: str) -> str:
    """A path template without the names of its parameters: what it matches."""
    return _PARAMETER.sub(lambda found: f"{{{found[1] or ':str'}}}", template)


def price_table(
    routes: Mapping[tuple[str, str], PricedRoute | Free], order: Iterable[tuple[str, str]] = ()
) -> RouteTable[PricedRoute | Free]:
    """Builds the table requests are looked up in.

    `order` is the order in which the app's own router would try them; what it does not name keeps
    its place in the list, behind.
    """
    first = [key for key in order if key in routes]
    keys = dict.fromkeys([*first, *routes])
    return RouteTable((method, template, routes[method, template]) for method, template in keys)

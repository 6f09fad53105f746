"""From a price list to offers: what is built once at start, so that no request has to."""

from collections.abc import Mapping
from dataclasses import dataclass

from x402mw.core.amounts import USDC, Atomic
from x402mw.core.gate import Book, Offer
from x402mw.core.pricing import Free
from x402mw.core.terms import Terms, control_terms, write_requirements
from x402mw.provider.answers import ServedRoute
from x402mw.provider.prices import PricedRoute

SUGGESTED_CALLS = 100


@dataclass(frozen=True, slots=True)
class Seller:
    """Who is paid, where and into which book: the parts of terms that no price list holds.

    `escrow` is the escrow's base URL, `control` the control path as buyers see it.
    """

    network: str
    network_id: bytes
    pay_to: str
    journal: bytes
    escrow: str
    path_prefix: str
    control: str
    deposit_min: Atomic


def serve_routes(
    seller: Seller, prices: Mapping[tuple[str, str], PricedRoute | Free]
) -> dict[tuple[str, str], ServedRoute]:
    """Builds the offer of every priced route, by (method, template)."""
    served = {}
    for key, route in prices.items():
        if isinstance(route, PricedRoute):
            terms = _terms(seller, route)
            suggested = Atomic(max(seller.deposit_min, SUGGESTED_CALLS * terms.amount))
            accepts = write_requirements(terms, escrow=seller.escrow, suggested_deposit=suggested)
            served[key] = ServedRoute(route, Offer(terms, accepts), terms.route)
    return served


def _terms(seller: Seller, route: PricedRoute) -> Terms:
    return Terms(
        network=seller.network,
        network_id=seller.network_id,
        pay_to=seller.pay_to,
        journal=seller.journal,
        asset=USDC.code,
        amount=route.price.amount,
        timeout_seconds=route.options.timeout_seconds,
        binding=route.binding,
        unit=route.price.unit,
        unit_price=route.price.unit_price,
        per=route.price.per,
        base=route.price.base,
        method=route.method,
        route=seller.path_prefix + route.template,
        control=seller.control,
    )


def make_book(
    seller: Seller,
    served: Mapping[tuple[str, str], ServedRoute],
    *,
    retired: Mapping[bytes, int],
    replaced: frozenset[bytes],
) -> Book:
    """Makes the book that the gate judges by."""
    offers = {one.offer.terms.id: one.offer for one in served.values()}
    any_terms = next(iter(offers.values())).terms
    return Book(
        network=seller.network,
        network_id=seller.network_id,
        pay_to=seller.pay_to,
        journal=seller.journal,
        asset=USDC.code,
        offers=offers,
        control=control_terms(any_terms),
        retired=retired,
        replaced=replaced,
    )

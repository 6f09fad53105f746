"""What providers ask: reading a 402, remembering offers, and probing unknown routes sparingly."""

import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import httpx

from x402mw.core import headers
from x402mw.core.amounts import USDC, parse_atomic
from x402mw.core.errors import AmountInvalid, Malformed
from x402mw.core.messages import EscrowExtra, PaymentRequired, PaymentRequirements, validate
from x402mw.core.routes import compile_template, priced_method
from x402mw.core.strict import dumps
from x402mw.core.terms import NETWORK_PREFIX, SCHEME, read_terms
from x402mw.core.vouchers import BIND_REQUEST
from x402mw_client.sessions import Offer
from x402mw_client.steps import Outgoing

ACCEPTS_BYTES_MAX = 1400
"""A longer offer would not fit, together with token and voucher, into a payment header of 4 KiB."""
ORIGINS_MAX = 1024
PLACES_MAX = 8192
OFFERS_PER_ORIGIN_MAX = 256
FOUND_MAX = 1024
# An absolute path of its own origin and nothing else: no host, no query, no way up.
CONTROL = re.compile(r"/(?!/)[A-Za-z0-9._~/-]*", re.ASCII)


_pattern = lru_cache(maxsize=1024)(compile_template)


def read_accepts(answer: httpx.Response) -> list[dict[str, Any]]:
    """The raw offers of a 402, in the provider's order; none if this is not x402 V2."""
    value = answer.headers.get(headers.PAYMENT_REQUIRED)
    if answer.status_code != httpx.codes.PAYMENT_REQUIRED or value is None:
        return []
    try:
        required = headers.decode_header(
            PaymentRequired, value.encode(), headers.REQUIRED_BYTES_MAX
        )
    except (Malformed, UnicodeEncodeError):
        return []
    return required.accepts


def names_escrow(accepts: dict[str, Any], escrows: frozenset[str]) -> bool:
    """Whether an offer is meant for our escrow: the only one this wallet knows."""
    extra = accepts.get("extra")
    url = extra.get("escrow") if isinstance(extra, dict) else None
    return (
        accepts.get("scheme") == SCHEME
        and str(accepts.get("network")).startswith(NETWORK_PREFIX)
        and isinstance(url, str)
        and normal_url(url) in escrows
    )


def normal_url(url: str) -> str:
    """One spelling for a base URL."""
    try:
        return str(httpx.URL(url)).rstrip("/")
    except httpx.InvalidURL:
        return ""


def read_offer(accepts: dict[str, Any], network: str, network_id: bytes) -> Offer:
    """Reads one offer and checks it in itself, or raises `Malformed`."""
    requirements = validate(PaymentRequirements, accepts)
    extra = validate(EscrowExtra, requirements.extra)
    terms = read_terms(requirements, extra, network_id)
    try:
        suggested = parse_atomic(extra.suggested_deposit)
    except AmountInvalid as error:
        raise Malformed(f"suggestedDeposit: {error}") from None
    constants = (requirements.scheme, requirements.network, requirements.asset)
    if constants != (SCHEME, network, USDC.code):
        raise Malformed("the offer is for another scheme, network or asset")
    if terms.amount == 0 or terms.binding > BIND_REQUEST or not CONTROL.fullmatch(terms.control):
        raise Malformed("the offer's amount, binding or control path cannot be used")
    if len(dumps(accepts)) > ACCEPTS_BYTES_MAX:
        raise Malformed("the offer is too long to be accepted in a header")
    return Offer(terms, accepts, suggested)


def covers(offer: Offer, method: str, path: str) -> bool:
    """Whether the offer's route is the route of this request."""
    terms = offer.terms
    same_method = terms.method == priced_method(method)
    return same_method and _pattern(terms.route).match(path) is not None


def choose(
    accepts: list[dict[str, Any]], request: Outgoing, network: str, network_id: bytes
) -> Offer | None:
    """The first offer, in the provider's order, that is sound and for this very route."""
    for entry in accepts:
        try:
            offer = read_offer(entry, network, network_id)
        except Malformed:
            continue
        if covers(offer, request.method, request.path):
            return offer
    return None


@dataclass
class LearntOffers:
    """Offers by origin, the latest last; bounded, the oldest forgotten first.

    What was found is kept until an offer changes: most calls ask for what was asked for before.
    """

    _origins: OrderedDict[str, list[Offer]] = field(default_factory=OrderedDict)
    _found: dict[tuple[str, str, str], Offer] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def learn(self, origin: str, offer: Offer) -> None:
        """Remembers an offer in place of any older one for its route."""
        terms = offer.terms
        route = (terms.method, terms.route)
        with self._lock:
            self._found.clear()
            kept = [
                known
                for known in self._origins.get(origin, ())
                if (known.terms.method, known.terms.route) != route
            ]
            self._origins[origin] = [*kept[1 - OFFERS_PER_ORIGIN_MAX :], offer]
            self._origins.move_to_end(origin)
            if len(self._origins) > ORIGINS_MAX:
                self._origins.popitem(last=False)

    def forget(self, origin: str, offer: Offer) -> None:
        """Forgets an offer that turned out not to hold."""
        with self._lock:
            self._found.clear()
            kept = [known for known in self._origins.get(origin, ()) if known is not offer]
            self._origins[origin] = kept

    def find(self, request: Outgoing) -> Offer | None:
        """The latest offer that fits; a GET may use what a HEAD learnt, and the other way round."""
        asked = request.origin, request.method, request.path
        with self._lock:
            found = self._found.get(asked)
            if found is None:
                offers = reversed(self._origins.get(request.origin, ()))
                found = next((one for one in offers if covers(one, *asked[1:])), None)
                if found is not None:
                    if len(self._found) == FOUND_MAX:
                        self._found.clear()
                    self._found[asked] = found
            return found


@dataclass
class ProbeGate:
    """Lets one unpaid request at a time explore what is unknown.

    An origin is unknown until its first response head of any kind; after that, only the first
    request to each new *place* (method, first segment, depth) is waited for, since what it learns
    most likely covers the others.
    """

    _open: OrderedDict[tuple[str, ...], None] = field(default_factory=OrderedDict)
    _probing: set[tuple[str, ...]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def enter(self, request: Outgoing) -> bool:
        """Whether this request may go now; it must `leave` if it went."""
        with self._lock:
            unknown = [name for name in _places(request) if name not in self._open][:1]
            if self._probing.intersection(unknown):
                return False
            self._probing.update(unknown)
            return True

    def leave(self, request: Outgoing, *, answered: bool) -> None:
        """Ends a probe; an answer of any kind opens the gate."""
        with self._lock:
            for name in _places(request):
                self._probing.discard(name)
                if answered:
                    self._open[name] = None
                    self._open.move_to_end(name)
            while len(self._open) > PLACES_MAX:
                self._open.popitem(last=False)


def _places(request: Outgoing) -> Iterator[tuple[str, ...]]:
    segments = request.path.split("/")
    yield (request.origin,)
    yield (request.origin, priced_method(request.method), segments[1], str(len(segments)))

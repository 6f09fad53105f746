"""Reading a 402 as a buyer would, and noticing what happened to it on its way."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from x402mw.core import headers
from x402mw.core.errors import ConfigurationError, Malformed
from x402mw.core.messages import EscrowExtra, PaymentRequired, PaymentRequirements, validate
from x402mw.core.routes import compile_template, parse_route, priced_method
from x402mw.core.strict import dumps, same
from x402mw.core.terms import NETWORK_PREFIX, SCHEME
from x402mw.doctor.asking import Answer
from x402mw.doctor.findings import Finding, finding
from x402mw_client.offers import CONTROL

ACCEPTS_BYTES_MAX = 1400
"""A longer offer does not fit, with token and voucher, into a payment header of 4 KiB."""
HEADERS_BYTES_SAFE = 4096


@dataclass(frozen=True, slots=True)
class Offered:
    """The first offer of ours in a 402: as it was sent, and as it reads. `url` is the resource."""

    accepts: dict[str, Any]
    requirements: PaymentRequirements
    extra: EscrowExtra
    url: str


def read_required(answer: Answer) -> tuple[PaymentRequired | None, list[Finding]]:
    """Reads the terms of a 402, if need be from its body, and tells what is wrong with them."""
    value = answer.headers.get(headers.PAYMENT_REQUIRED)
    if value is None:
        return _without_header(answer)
    found = list(_sizes(answer, value))
    required = _decode(value)
    body = answer.content.get("accepts")
    if required is None or (isinstance(body, list) and not same(body, required.accepts)):
        found.append(finding("header_altered", f"{headers.PAYMENT_REQUIRED}: {value[:60]}..."))
        return required or _from_body(answer), found
    return required, found


def _without_header(answer: Answer) -> tuple[PaymentRequired | None, list[Finding]]:
    for name, value in answer.headers.items():
        required = _decode(value)
        if required is not None:
            return required, [finding("header_renamed", f"the terms are in {name}")]
    required = _from_body(answer)
    seen = f"a 402 without {headers.PAYMENT_REQUIRED}"
    return required, [] if required is None else [finding("header_stripped", seen)]


def _from_body(answer: Answer) -> PaymentRequired | None:
    """The offers that our 402 repeats in its body."""
    try:
        content = {"x402Version": 2, "accepts": answer.content.get("accepts")}
        return validate(PaymentRequired, content) if answer.problem else None
    except Malformed:
        return None


def _decode(value: str) -> PaymentRequired | None:
    try:
        return headers.decode_header(PaymentRequired, value.encode(), headers.REQUIRED_BYTES_MAX)
    except (Malformed, UnicodeEncodeError):
        return None


def _sizes(answer: Answer, value: str) -> Iterator[Finding]:
    total = sum(len(name) + len(text) + 4 for name, text in answer.headers.raw)
    if len(value) > headers.REQUIRED_BYTES_MAX:
        yield finding("header_too_large", f"{headers.PAYMENT_REQUIRED} has {len(value)} bytes")
    elif total > HEADERS_BYTES_SAFE:
        yield finding("header_large", f"the headers of the 402 have {total} bytes")


def read_offer(required: PaymentRequired) -> tuple[Offered | None, list[Finding]]:
    """Picks the first offer of ours and checks it in itself; None if there is none to go on with.

    Whether its terms hash to their id only the escrow's root key can tell.
    """
    ours = [entry for entry in required.accepts if _is_ours(entry)]
    if not ours:
        seen = ", ".join(str(entry.get("scheme"))[:40] for entry in required.accepts) or "no offers"
        return None, [finding("not_ours", f"offers: {seen}")]
    try:
        requirements = validate(PaymentRequirements, ours[0])
        extra = validate(EscrowExtra, requirements.extra)
        compile_template(parse_route(extra.route)[1])
        if not CONTROL.fullmatch(extra.control):
            # Appended to an origin it could name another one.
            raise Malformed(f"the control path is no path: {extra.control}")
    except (Malformed, ConfigurationError) as error:
        return None, [finding("offer_malformed", str(error))]
    found = []
    if len(dumps(ours[0])) > ACCEPTS_BYTES_MAX:
        found.append(finding("offer_too_long", f"the offer has {len(dumps(ours[0]))} bytes"))
    if _routes(ours).count(extra.route) > 1:
        found.append(finding("duplicate_offers", f"{len(ours)} offers, two for {extra.route}"))
    url = required.resource.url if required.resource else ""
    return Offered(ours[0], requirements, extra, url), found


def _is_ours(entry: dict[str, Any]) -> bool:
    return entry.get("scheme") == SCHEME and str(entry.get("network")).startswith(NETWORK_PREFIX)


def _routes(entries: list[dict[str, Any]]) -> list[Any]:
    extras = (entry.get("extra") for entry in entries)
    return [extra.get("route") for extra in extras if isinstance(extra, dict)]


def check_place(offered: Offered, method: str, url: httpx.URL) -> Iterator[Finding]:
    """Compares where the offer says it holds with where it was found."""
    offer_method, template = parse_route(offered.extra.route)
    if not compile_template(template).match(url.path):
        yield finding("path_rewritten", f"asked for {url.path}, offered {template}")
    if offer_method != priced_method(method):
        yield finding("method_rewritten", f"asked with {method}, offered {offer_method}")
    if offered.url:
        ours, theirs = origin_of(str(url)), origin_of(offered.url)
        if ours != theirs:
            seen = f"asked at {ours}, the provider believes to be {theirs}"
            yield finding("origin_mismatch", seen)


def origin_of(url: str) -> str:
    """The origin of a URL, in the one form that vouchers are bound to; "?" if it has none."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return "?"
    return f"{parsed.scheme}://{parsed.netloc.decode('ascii', 'replace').lower()}"

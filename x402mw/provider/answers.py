"""What the provider itself answers: terms, refusals, and the header of every paid answer."""

import html
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope, Send

from x402mw.core import headers, ids
from x402mw.core.amounts import Atomic, display
from x402mw.core.gate import Book, Call, CallState, Offer, Refused
from x402mw.core.sessions import Account
from x402mw.core.strict import b64_encode, b64url_encode, dumps
from x402mw.provider.prices import PricedRoute

Headers = list[tuple[bytes, bytes]]
Unpaid = tuple[tuple[Headers, bytes], tuple[Headers, bytes]]
"""Header fields and body of a 402: as problem details, and as a page."""

REASON_PREFIX = "invalid_batch_settlement_escrow_"
PROBLEM_PREFIX = "urn:x402mw:problem:"
PAYMENT_RESPONSE = headers.PAYMENT_RESPONSE.lower().encode()
PAYMENT_REQUIRED = headers.PAYMENT_REQUIRED.lower().encode()
JOURNAL_RETRY_SECONDS = 5
NO_STORE = (b"cache-control", b"no-store")
STATES = {CallState.OPEN: "running", CallState.STARTED: "open", CallState.SETTLED: "settled"}
_TITLES = {
    400: "The payment is malformed",
    402: "Payment required",
    404: "Not found",
    405: "Method not allowed",
    408: "Too slow",
    409: "Conflict",
    410: "The answer is gone",
    413: "Too large",
    414: "The path is too long",
    421: "Misdirected request",
    429: "Too many requests",
    500: "The provider failed",
    503: "Not now",
    504: "The provider took too long",
}


@dataclass(slots=True)
class ServedRoute:
    """A priced route with its current offer, and its 402 prebuilt for each origin."""

    route: PricedRoute
    offer: Offer
    external_path: str
    unpaid: dict[str, Unpaid] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Figures:
    """What `PAYMENT-RESPONSE` tells of an admitted call; amounts are atomic units."""

    commitment: bytes
    seq: int
    payer: str
    state: str
    final: bool
    charge: Atomic
    charged_total: Atomic | None
    open_total: Atomic | None
    reason: str = ""


def payment_response(book: Book, figures: Figures) -> tuple[bytes, bytes]:
    """The `PAYMENT-RESPONSE` header of a call that has a row in the journal."""
    extra = {"seq": str(figures.seq), "state": figures.state, "final": figures.final}
    if figures.charged_total is not None:
        extra["chargedTotal"] = str(figures.charged_total)
        extra["openTotal"] = str(figures.open_total)
    content = {
        "success": True,
        "transaction": figures.commitment.hex(),
        "network": book.network,
        "amount": str(figures.charge),
        "extra": extra,
    }
    if figures.payer:
        content["payer"] = figures.payer
    if figures.reason:
        content["errorReason"] = REASON_PREFIX + figures.reason
    return PAYMENT_RESPONSE, b64_encode(dumps(content)).encode()


def refusal_response(book: Book, refusal: Refused) -> list[tuple[bytes, bytes]]:
    """The `PAYMENT-RESPONSE` header of a refusal, once the seq is known; else nothing."""
    if refusal.seq is None or refusal.commitment is None:
        return []
    if refusal.call is not None:
        figures = _call_figures(refusal.call, refusal.account or Account(), refusal.reason)
        return [payment_response(book, figures)]
    extra: dict[str, Any] = {
        "seq": str(refusal.seq),
        "state": "refused",
        "final": refusal.final,
    }
    if refusal.account is not None:
        extra["chargedTotal"] = str(refusal.account.charged)
        extra["openTotal"] = str(refusal.account.reserved)
        if refusal.reason == "cover" and refusal.best:
            extra["voucher"] = b64url_encode(refusal.best)
    content = {
        "success": False,
        "transaction": refusal.commitment.hex(),
        "network": book.network,
        "errorReason": REASON_PREFIX + refusal.reason,
        "errorMessage": refusal.detail,
        "extra": extra,
    }
    return [(PAYMENT_RESPONSE, b64_encode(dumps(content)).encode())]


def _call_figures(call: Call, account: Account, reason: str = "") -> Figures:
    return Figures(
        commitment=call.commitment,
        seq=call.seq,
        payer="",
        state=STATES[call.state],
        final=call.state is CallState.SETTLED,
        charge=call.charge,
        charged_total=account.charged,
        open_total=account.reserved,
        reason=reason,
    )


def replay_figures(call: Call, account: Account, payer: str) -> Figures:
    """What an identical retry is told about its settled call."""
    return Figures(
        commitment=call.commitment,
        seq=call.seq,
        payer=payer,
        state="settled",
        final=True,
        charge=call.charge,
        charged_total=account.charged,
        open_total=account.reserved,
    )


def problem(status: int, code: str, detail: str, **more: Any) -> bytes:
    """The body of a refusal: problem details (RFC 9457) with a stable `code`."""
    return dumps(
        {
            "type": PROBLEM_PREFIX + code,
            "title": _TITLES.get(status, "Refused"),
            "status": status,
            "code": code,
            "detail": detail,
            **more,
        }
    )


async def send_answer(
    scope: Scope, send: Send, status: int, found: Headers, body: bytes, kind: bytes
) -> None:
    """Sends a whole answer of the provider's own."""
    whole, _ = _whole(found, kind, body)
    await send({"type": "http.response.start", "status": status, "headers": whole})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


async def send_problem(
    scope: Scope, send: Send, status: int, code: str, detail: str, *, found: Headers | None = None
) -> None:
    """Sends a problem document that no cache may keep."""
    body = problem(status, code, detail)
    kind = b"application/problem+json"
    await send_answer(scope, send, status, [NO_STORE, *(found or [])], body, kind)


def unavailable() -> Refused:
    """The refusal of a payment while the journal cannot be used; the same bytes may pass later."""
    detail = "the provider cannot use its journal now; send the same request again"
    return Refused(503, "journal", detail, retry_after=JOURNAL_RETRY_SECONDS)


async def send_refusal(
    scope: Scope, send: Send, book: Book, refusal: Refused, served: ServedRoute | None, origin: str
) -> None:
    """Sends a refusal: problem details, the payment header, and fresh terms with a 402."""
    found = [NO_STORE, *refusal_response(book, refusal)]
    if refusal.retry_after:
        found.append((b"retry-after", str(refusal.retry_after).encode()))
    if refusal.status == 402 and served is not None:
        reason = REASON_PREFIX + refusal.reason
        found.append((PAYMENT_REQUIRED, _required(served, origin, reason)))
    body = problem(refusal.status, refusal.reason, refusal.detail, **refusal.more)
    await send_answer(scope, send, refusal.status, found, body, b"application/problem+json")


async def send_unpaid(scope: Scope, send: Send, served: ServedRoute, origin: str) -> None:
    """Sends the terms of a route: to a browser as a page, to software as problem details."""
    built = served.unpaid.get(origin)
    if built is None:
        built = _build_unpaid(served, origin)
        # Only configured and loopback origins come here; the bound is for a flood of odd ports.
        if len(served.unpaid) < 64:
            served.unpaid[origin] = built
    found, body = built[_wants_page(scope)]
    # A list of its own: who stands in front of us may add to it.
    await send({"type": "http.response.start", "status": 402, "headers": [*found]})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


def _wants_page(scope: Scope) -> bool:
    return any(name == b"accept" and b"text/html" in value for name, value in scope["headers"])


def _required(served: ServedRoute, origin: str, error: str) -> bytes:
    """The `PAYMENT-REQUIRED` header: our one offer for this route."""
    options = served.route.options
    resource = {"url": origin + served.external_path}
    if options.description:
        resource["description"] = options.description
    content = {
        "x402Version": 2,
        "error": error,
        "resource": resource,
        "accepts": [served.offer.accepts],
    }
    return b64_encode(dumps(content)).encode()


def _build_unpaid(served: ServedRoute, origin: str) -> Unpaid:
    found = [NO_STORE, (PAYMENT_REQUIRED, _required(served, origin, "Payment required"))]
    detail = f"This request costs {describe(served)}. Pay with an x402 V2 client."
    body = problem(402, "payment_required", detail, accepts=[served.offer.accepts])
    problem_type, page_type = b"application/problem+json", b"text/html; charset=utf-8"
    return _whole(found, problem_type, body), _whole(found, page_type, _page(detail))


def _whole(found: Headers, kind: bytes, body: bytes) -> tuple[Headers, bytes]:
    """Header fields and body of a whole answer."""
    length = str(len(body)).encode()
    return [*found, (b"content-type", kind), (b"content-length", length)], body


def describe(served: ServedRoute) -> str:
    """A price in words."""
    terms = served.offer.terms
    most = f"{display(terms.amount)} {terms.asset}"
    if not terms.metered:
        return most
    price = f"{display(terms.unit_price)} {terms.asset} per {terms.per} {terms.unit}"
    base = f"{display(terms.base)} {terms.asset} and " if terms.base else ""
    return f"{base}{price}, at most {most}"


def _page(detail: str) -> bytes:
    text = html.escape(detail)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Payment required</title>'
        '<meta name="viewport" content="width=device-width">'
        "<style>body{font:18px/1.5 system-ui;max-width:34em;margin:4em auto;padding:0 1em}</style>"
        f"<h1>Payment required</h1><p>{text}</p><p>This address is for software that pays as it "
        "calls: point an agent with a wallet at it.</p></html>"
    ).encode()


def session_id(raw: bytes) -> str:
    """A session id as people and the escrow write it."""
    return ids.format_id(ids.ESCROW, raw)

"""What the doctor may find: for each finding its severity, why it matters, and what to do."""

from dataclasses import dataclass
from enum import Enum
from typing import Any


class Severity(Enum):
    """A problem keeps buyers from paying or risks money; a warning may, some day."""

    PROBLEM = "problem"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found. `seen` is what was observed, in plain characters."""

    code: str
    severity: Severity
    seen: str
    why: str
    todo: str

    def as_json(self) -> dict[str, Any]:
        """The finding as plain values."""
        return {
            "code": self.code,
            "severity": self.severity.value,
            "seen": self.seen,
            "why": self.why,
            "todo": self.todo,
        }


SEEN_CHARACTERS_MAX = 300
_PROXY = "Have the proxy in front pass"
_CLOCKS = "Let NTP set the clock of this machine, of the provider and of the escrow."

PROBLEMS: dict[str, tuple[str, str]] = {
    "redirect": (
        "Buyers pay no request that was redirected to another origin, and lose a round trip.",
        "Publish the address that answers itself; leave redirects to browsers.",
    ),
    "insecure": (
        "Buyers pay over https or on their own machine only.",
        "Put TLS in front, and name the https address in X402MW_ORIGINS.",
    ),
    "not_402": (
        "Nothing here asks for payment: the path is free, or no provider of ours is behind it.",
        "Check the path, the method (--method) and the price list.",
    ),
    "not_ours": (
        "The answer asks for payment, but not in a way that this version of x402mw understands.",
        "Check that the address is that of a provider with x402mw's middleware.",
    ),
    "refuses": (
        "The provider's own payment layer refuses this request before it names a price.",
        "Read the detail: it says what this path or method is missing.",
    ),
    "unknown_host": (
        "The provider does not know the host name it was asked for, and answers nobody there.",
        "Add this address to X402MW_ORIGINS, and have the proxy pass the Host header unchanged.",
    ),
    "header_stripped": (
        "Buyers read the terms from the PAYMENT-REQUIRED header; without it they cannot pay.",
        f"{_PROXY} all PAYMENT-* headers of answers.",
    ),
    "header_renamed": (
        "Buyers look for PAYMENT-REQUIRED and will not find the terms under another name.",
        f"{_PROXY} PAYMENT-REQUIRED under its own name.",
    ),
    "header_altered": (
        "Buyers recompute the id of the terms and ignore an offer that was changed on its way.",
        f"{_PROXY} PAYMENT-REQUIRED byte for byte.",
    ),
    "header_too_large": (
        "Buyers read no PAYMENT-REQUIRED of more than 32 KiB.",
        "Offer fewer ways to pay on this route.",
    ),
    "offer_too_long": (
        "A buyer repeats the offer in its payment header of at most 4 KiB; this one does not fit.",
        "Shorten the route's path template or the control path.",
    ),
    "offer_malformed": (
        "Buyers ignore an offer that contradicts itself.",
        "Find what alters the header; else tell the maintainers of x402mw what was seen.",
    ),
    "terms_mismatch": (
        "The terms do not hash to their id under the escrow's root key: buyers ignore them.",
        "Check that the provider and buyers use the same escrow, and that nothing alters headers.",
    ),
    "duplicate_offers": (
        "Two offers for one route: buyers take the first, and nobody knows what the second means.",
        "Mount the middleware once, and price each route once.",
    ),
    "path_rewritten": (
        "The offer is for another path than was asked for: buyers ignore it.",
        "Have the proxy pass the path unchanged, or tell the middleware its path_prefix.",
    ),
    "method_rewritten": (
        "The offer is for another method than was asked for: buyers ignore it.",
        "Have the proxy pass the method unchanged.",
    ),
    "origin_mismatch": (
        "Buyers sign for the address they call. The provider believes to be at another one, so "
        "every payment is refused (400 request_binding).",
        "Set X402MW_ORIGINS to the address buyers use; have the proxy pass Host and the scheme.",
    ),
    "cached": (
        "A cache answers in the provider's place, so buyers may get old terms or others' answers.",
        "Do not cache answers of priced paths; honour Cache-Control: no-store and private.",
    ),
    "clock_wrong": (
        "Vouchers live for minutes: with clocks two minutes apart payments are refused.",
        _CLOCKS,
    ),
    "clock_escrow": (
        "A provider more than 30 s away from its escrow's clock takes no new calls (503 clock).",
        _CLOCKS,
    ),
    "head_not_priced": (
        "HEAD runs the same handler as GET, so it must cost the same; here it does not.",
        "Have the proxy pass HEAD to the provider instead of answering it.",
    ),
    "signature_stripped": (
        "The provider never sees the payment: buyers pay, and are asked to pay again.",
        f"{_PROXY} the PAYMENT-SIGNATURE header of requests.",
    ),
    "signature_altered": (
        "The payment header does not arrive as it was sent, so no payment can verify.",
        f"{_PROXY} PAYMENT-SIGNATURE byte for byte.",
    ),
    "signature_blocked": (
        "Something in front of the provider refuses requests that carry a payment.",
        "Allow the PAYMENT-SIGNATURE header in the proxy or firewall.",
    ),
    "header_limit": (
        "Payment headers may have 4 KiB; a long one does not come through.",
        "Raise the proxy's limit for one request header to 8 KiB.",
    ),
    "response_stripped": (
        "Without PAYMENT-RESPONSE a buyer cannot tell what it paid, and takes answers for lost.",
        f"{_PROXY} all PAYMENT-* headers of answers, also on errors.",
    ),
    "control_unreachable": (
        "Buyers close sessions and ask for receipts there; else their money is locked for longer.",
        "Route the control path to the provider, for POST.",
    ),
    "escrow_insecure": (
        "Buyers lock money over https or on their own machine only.",
        "Give the provider the escrow's https address.",
    ),
    "escrow_local": (
        "The terms name an escrow on the provider's own machine, which no buyer elsewhere reaches.",
        "Give the provider the escrow's public address (X402MW_ESCROW).",
    ),
    "escrow_unreachable": (
        "Buyers cannot open a session, and the provider cannot redeem.",
        "Check that the escrow runs, and that its address in the terms is reachable from outside.",
    ),
    "escrow_network": (
        "The escrow at that address runs another network than the terms name.",
        "Check X402MW_ESCROW, and that the journal belongs to this escrow.",
    ),
    "escrow_keys": (
        "The escrow's key set is not signed by its root key, or not by the one you expect.",
        "Check the address and the root key; if both are right, trust neither until it is clear.",
    ),
}
"""Why, and what to do."""

WARNINGS: dict[str, tuple[str, str]] = {
    "header_large": (
        "Some proxies drop answers whose headers exceed 4 KiB.",
        "Raise the proxy's buffer for headers, or shorten the descriptions of prices.",
    ),
    "cacheable": (
        "A 402 without Cache-Control: no-store may be kept by caches and shown to payers.",
        "Have the proxy pass Cache-Control unchanged.",
    ),
    "compressed": (
        "Whoever compresses here compresses paid answers too: it drops their Content-Length, "
        "buffers streams, and control answers that are compressed are not read.",
        "Exclude priced paths and the control path from compression, or compress in the app.",
    ),
    "problem_unreadable": (
        "Refusals say in their body what is wrong; something replaces it by a page of its own.",
        "Have the proxy pass the bodies of 4xx answers (no error pages of its own).",
    ),
    "clock_off": (
        "The provider's clock differs from this machine's by more than 30 s; one of them is wrong.",
        _CLOCKS,
    ),
    "no_date": (
        "Without a Date header nobody can notice that the provider's clock is off.",
        "Have the server or the proxy send Date.",
    ),
}


def finding(code: str, seen: str) -> Finding:
    """Makes a finding; what a server said in it is cut, and shown in plain characters."""
    severity = Severity.PROBLEM if code in PROBLEMS else Severity.WARNING
    why, todo = PROBLEMS.get(code) or WARNINGS[code]
    plain = "".join(one if one.isprintable() else "?" for one in seen[:SEEN_CHARACTERS_MAX])
    return Finding(code, severity, plain, why, todo)

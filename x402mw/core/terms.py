"""Terms: everything that fixes what one request may cost and to whom it is paid.

Their id is a hash that both sides compute from what they see, so a buyer never signs a price it did
not read and a provider never charges one it did not offer. `docs/protocol.md`, Terms.
"""

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

from x402mw.core import ids
from x402mw.core.amounts import ZERO, Atomic, parse_atomic
from x402mw.core.errors import AmountInvalid, ConfigurationError, Malformed
from x402mw.core.messages import EscrowExtra, PaymentRequirements
from x402mw.core.routes import parse_route
from x402mw.core.vouchers import BIND_BODY, lp

TERMS_TAG = b"x402mw/terms\x00\x01"
SCHEME = "batch-settlement"
NETWORK_PREFIX = "escrow:"
CONTROL_TIMEOUT_SECONDS = 60
_CONTROL = re.compile(r"/(?![/\\])[!-~]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms of one route.

    `amount` is the most one request may cost; `unit_price` atomic units buy `per` quantities of
    `unit`, on top of `base`. Per-call terms have unit '' and zeros. `network_id` is the escrow's.
    """

    network: str
    network_id: bytes
    pay_to: str
    journal: bytes
    asset: str
    amount: Atomic
    timeout_seconds: int
    binding: int
    unit: str
    unit_price: int
    per: int
    base: Atomic
    method: str
    route: str
    control: str
    id: bytes = field(init=False, compare=False, default=b"")

    def __post_init__(self) -> None:
        """Computes the id once; terms are looked up by it on every request."""
        object.__setattr__(self, "id", terms_id(self))

    @property
    def metered(self) -> bool:
        """Whether the charge depends on what the handler counted."""
        return self.unit != ""


def terms_id(terms: Terms) -> bytes:
    """Hashes terms to the 32 bytes that vouchers sign."""
    parts = (
        TERMS_TAG,
        terms.network_id,
        lp(16, terms.pay_to),
        terms.journal,
        lp(16, terms.asset),
        terms.amount.to_bytes(8, "big"),
        terms.timeout_seconds.to_bytes(4, "big"),
        terms.binding.to_bytes(1, "big"),
        lp(16, terms.unit),
        terms.unit_price.to_bytes(8, "big"),
        terms.per.to_bytes(8, "big"),
        terms.base.to_bytes(8, "big"),
        lp(16, terms.method),
        lp(16, terms.route),
        lp(16, terms.control),
    )
    return hashlib.sha256(b"".join(parts)).digest()


def control_terms(offer: Terms) -> Terms:
    """The terms of the control path, which both sides build from any offer of the provider."""
    return Terms(
        network=offer.network,
        network_id=offer.network_id,
        pay_to=offer.pay_to,
        journal=offer.journal,
        asset=offer.asset,
        amount=ZERO,
        timeout_seconds=CONTROL_TIMEOUT_SECONDS,
        binding=BIND_BODY,
        unit="",
        unit_price=0,
        per=0,
        base=ZERO,
        method="POST",
        route=offer.control,
        control=offer.control,
    )


def write_requirements(terms: Terms, *, escrow: str, suggested_deposit: Atomic) -> dict[str, Any]:
    """Writes terms as one entry of `accepts`. Everything of ours lives in `extra`."""
    extra: dict[str, Any] = {
        "escrow": escrow,
        "journal": ids.format_id(ids.JOURNAL, terms.journal),
        "terms": terms.id.hex(),
        "route": f"{terms.method} {terms.route}",
        "binding": terms.binding,
        "control": terms.control,
        "suggestedDeposit": str(suggested_deposit),
    }
    if terms.metered:
        extra |= {
            "unit": terms.unit,
            "unitPrice": str(terms.unit_price),
            "per": terms.per,
            "base": str(terms.base),
        }
    return {
        "scheme": SCHEME,
        "network": terms.network,
        "asset": terms.asset,
        "amount": str(terms.amount),
        "payTo": terms.pay_to,
        "maxTimeoutSeconds": terms.timeout_seconds,
        "extra": extra,
    }


def read_terms(requirements: PaymentRequirements, extra: EscrowExtra, network_id: bytes) -> Terms:
    """Reads terms back from requirements and checks that `extra.terms` is their id.

    Raises `Malformed` if the requirements contradict themselves.
    """
    try:
        method, route = parse_route(extra.route)
        terms = Terms(
            network=requirements.network,
            network_id=network_id,
            pay_to=requirements.pay_to,
            journal=ids.parse_id(ids.JOURNAL, extra.journal),
            asset=requirements.asset,
            amount=parse_atomic(requirements.amount),
            timeout_seconds=requirements.max_timeout_seconds,
            binding=extra.binding,
            unit=extra.unit,
            unit_price=parse_atomic(extra.unit_price),
            per=extra.per,
            base=parse_atomic(extra.base),
            method=method,
            route=route,
            control=extra.control,
        )
    except (AmountInvalid, ConfigurationError) as error:
        raise Malformed(f"the payment requirements are malformed: {error}") from None
    _check_sense(terms)
    if terms.id.hex() != extra.terms:
        raise Malformed("the payment requirements do not hash to their terms id")
    return terms


def _check_sense(terms: Terms) -> None:
    """Refuses terms that hash well but mean nothing, or would send control elsewhere."""
    price = (terms.unit_price, terms.per, terms.base)
    sound = (all(price[:2]) and terms.base <= terms.amount) if terms.metered else not any(price)
    if not sound:
        raise Malformed("the unit, its price, the base and the amount contradict each other")
    if not _CONTROL.fullmatch(terms.control):
        raise Malformed("control is a path on the same origin")

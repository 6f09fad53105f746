"""What the gate judges by: the provider's offers, who it is, and how it stands right now."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from x402mw.core.amounts import ZERO, Atomic
from x402mw.core.terms import Terms


@dataclass(frozen=True, slots=True)
class Offer:
    """Terms of one priced route, and the entry of `accepts` that states them."""

    terms: Terms
    accepts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Book:
    """What the gate judges by; replaced as a whole whenever something in it changes.

    `offers` are the current ones by terms id; `retired` tells when (seconds) former ids stopped
    being offered; `replaced` are journal ids that a restored backup has given up.
    """

    network: str
    network_id: bytes
    pay_to: str
    journal: bytes
    asset: str
    offers: Mapping[bytes, Offer]
    control: Terms
    retired: Mapping[bytes, int] = field(default_factory=dict)
    replaced: frozenset[bytes] = frozenset()


@dataclass(frozen=True, slots=True)
class Standing:
    """What else bears on admission: the escrow's absence, our clock, and value not yet redeemed.

    `escrow_away`: it cannot be reached, or takes no redemptions.
    `throttled`: the session has had its share of calls that cost nothing, for this minute.
    """

    throttled: bool = False
    escrow_away: bool = False
    clock_off: bool = False
    unredeemed: Atomic = ZERO
    unredeemed_max: Atomic = ZERO

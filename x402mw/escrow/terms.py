"""One hash over everything that is fixed when an escrow is made, which its first entry holds.

Pure. The form is written down in `docs/audit.md`: entries that hold it are never written anew.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from x402mw.escrow.rules.values import Escrow

_TAG = b"x402mw/terms\x00\x01"
FIXED = (
    *("escrow_id", "kind", "buyer", "provider", "asset", "fee_bps", "referral_bps", "referrer"),
    *("payees", "session_key", "journal", "memo", "on_expiry", "created_at", "low_balance"),
)
"""The fields of every escrow that stay as they were at creation."""

Milestone = tuple[int, str, int]
"""The number of a part, its name, and what it is worth in atomic units."""


class Extra(NamedTuple):
    """What only a manual escrow has."""

    condition: str
    review_seconds: int | None
    parts: Sequence[Milestone]


def hash_terms(escrow: Escrow, extra: Extra | None = None) -> str:
    """Hex SHA-256 of a tag and the terms as JSON with sorted names, compact and ASCII."""
    terms: dict[str, Any] = {name: getattr(escrow, name) for name in FIXED}
    if extra is not None:
        terms |= {"condition": extra.condition, "review_seconds": extra.review_seconds}
        terms["parts"] = [list(part) for part in extra.parts]
    text = json.dumps(terms, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(_TAG + text.encode()).hexdigest()

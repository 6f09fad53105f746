"""The key of one purchase: the same purchase has the same key wherever it is tried again.

SHA-256 over the tag "x402mw/purchase" 00 01 and a JSON list without blanks, in UTF-8, whose objects
are sorted by their names: session, task, vendor, resource, asset, the maximum in atomic units as a
text, parameters, occurrence. Rule 8 of `docs/money.md`.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from x402mw.core.amounts import Atomic, atomic
from x402mw.core.errors import LocalError
from x402mw.core.strict import b64url_encode

PURCHASE_TAG = b"x402mw/purchase\x00\x01"
_PLAIN = (str, bool, int, type(None))


def purchase_key(
    *,
    session: str,
    task: str,
    vendor: str,
    resource: str,
    asset: str,
    max_amount: Atomic,
    parameters: Mapping[str, Any] | None = None,
    occurrence: int = 0,
) -> str:
    """The `Idempotency-Key` of a purchase: 43 characters.

    `max_amount` is in atomic units. `parameters` are texts, whole numbers, booleans, None, and
    lists and mappings of them; anything else is a `LocalError`, because it has no one spelling.
    `occurrence` counts intended purchases that are otherwise the same, and goes up after a refusal.
    """
    _check_names(session, task, vendor, resource, asset)
    said = dict(parameters or {})
    _check(said)
    maximum, count = str(atomic(max_amount)), int(atomic(occurrence))
    values = [session, task, vendor, resource, asset, maximum, said, count]
    try:
        written = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        raw = written.encode()
    except UnicodeEncodeError:
        raise LocalError("half a character (a lone surrogate) has no one spelling") from None
    return b64url_encode(hashlib.sha256(PURCHASE_TAG + raw).digest())


def _check_names(*names: Any) -> None:
    if not all(isinstance(name, str) for name in names):
        raise LocalError("session, task, vendor, resource and asset are texts")


def _check(value: Any) -> None:
    if isinstance(value, dict):
        # A name that is no text would be written as if it were one.
        if not all(isinstance(name, str) for name in value):
            raise LocalError("parameters are named by texts")
        parts = list(value.values())
    elif isinstance(value, (list, tuple)):
        parts = list(value)
    elif isinstance(value, _PLAIN):
        return
    else:
        raise LocalError(f"a {type(value).__name__} has no one spelling in a purchase key")
    for part in parts:
        _check(part)

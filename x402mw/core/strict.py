"""Strict decoding of what strangers send: one text has one meaning, or it is refused.

JSON without duplicate keys, NaN, lone surrogates or deep nesting; base64 that re-encodes to itself
(`docs/protocol.md`, Encodings). Size is the caller's to limit, before it calls.
"""

import base64
import binascii
import json
from decimal import Decimal, InvalidOperation
from typing import Any, NoReturn

from x402mw.core.errors import Malformed

NESTING_MAX = 8


def loads(raw: bytes, nesting_max: int = NESTING_MAX) -> Any:
    """Parses JSON, or raises `Malformed`. Numbers with a point become `Decimal`, never float."""
    try:
        text = raw.decode("utf-8")
        value = _DECODER.decode(text)
    except RecursionError:
        raise Malformed("the JSON is nested too deeply") from None
    except ValueError:
        raise Malformed("this is not JSON in UTF-8") from None
    # Fewer brackets than levels cannot nest too deeply, so ordinary input skips the walk.
    if text.count("{") + text.count("[") > nesting_max:
        _check_nesting(value, nesting_max)
    if "\\u" in text:
        _check_surrogates(value)
    return value


def loads_object(raw: bytes, nesting_max: int = NESTING_MAX) -> dict[str, Any]:
    """Parses JSON that must be an object, or raises `Malformed`."""
    value = loads(raw, nesting_max)
    if not isinstance(value, dict):
        raise Malformed("the JSON must be an object")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Malformed("a JSON object repeats a key")
    return found


def _exact_number(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation:
        raise Malformed("a JSON number is out of all bounds") from None


def _no_constant(name: str) -> NoReturn:
    raise Malformed(f"{name} is not JSON")


def _no_echo(value: object) -> NoReturn:
    if isinstance(value, Decimal):
        raise Malformed("a number with a point cannot be written as it was read")
    raise TypeError(f"{type(value).__name__} has no JSON")


# Made once: a new one for every message costs more than most messages do.
_DECODER = json.JSONDecoder(
    object_pairs_hook=_without_duplicates, parse_constant=_no_constant, parse_float=_exact_number
)
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=_no_echo)


def _check_nesting(value: Any, levels_left: int) -> None:
    if not isinstance(value, (dict, list)):
        return
    if levels_left == 0:
        raise Malformed("the JSON is nested too deeply")
    for child in value.values() if isinstance(value, dict) else value:
        _check_nesting(child, levels_left - 1)


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise Malformed("the JSON holds half a character (a lone surrogate)") from None


def same(left: Any, right: Any) -> bool:
    """Tells whether two decoded JSON values are equal, where `true`, `1` and `1.0` all differ."""
    if type(left) is not type(right) or left != right:
        return False
    # Equal by value, so the shapes are the same, and nothing but a string equals a string.
    if isinstance(left, dict):
        for key, one in left.items():
            if type(one) is not str and not same(one, right[key]):
                return False
    if isinstance(left, list):
        return all(map(same, left, right))
    return True


def dumps(value: Any) -> bytes:
    """Writes JSON compactly: what goes into headers should be short.

    Raises `Malformed` for what `loads` read and nobody can echo: a number with a point.
    """
    return _ENCODER.encode(value).encode()


def b64_encode(raw: bytes) -> str:
    """Writes standard padded base64, the alphabet of x402 headers."""
    return base64.b64encode(raw).decode("ascii")


def b64_decode(text: bytes) -> bytes:
    """Reads standard padded base64 that is canonical, or raises `Malformed`."""
    try:
        raw = binascii.a2b_base64(text)
    except binascii.Error:
        raise Malformed("this is not standard base64") from None
    # What is not of the alphabet was skipped, and shows here.
    if base64.b64encode(raw) != text:
        raise Malformed("this base64 is not canonical")
    return raw


def b64url_encode(raw: bytes) -> str:
    """Writes base64url without padding: vouchers and keys."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")


def b64url_decode(text: str, size: int) -> bytes:
    """Reads canonical unpadded base64url of exactly `size` bytes, or raises `Malformed`."""
    # The length is checked first so that no junk of any size is ever decoded.
    if len(text) != (size * 8 + 5) // 6 or not text.isascii():
        raise Malformed(f"expected {size} bytes in base64url without padding")
    try:
        raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error:
        raise Malformed("this is not base64url") from None
    if len(raw) != size or b64url_encode(raw) != text:
        raise Malformed("this base64url is not canonical")
    return raw

"""The three payment headers of x402 V2: names, size limits, and the way in and out of base64."""

from typing import TypeVar

from pydantic import BaseModel

from x402mw.core.errors import Malformed
from x402mw.core.messages import as_json, parse
from x402mw.core.strict import b64_decode, b64_encode, dumps

PAYMENT_REQUIRED = "PAYMENT-REQUIRED"
PAYMENT_SIGNATURE = "PAYMENT-SIGNATURE"
PAYMENT_RESPONSE = "PAYMENT-RESPONSE"

SIGNATURE_BYTES_MAX = 4 * 1024
"""A payment header longer than this is refused before it is decoded."""
RESPONSE_BYTES_MAX = 8 * 1024
REQUIRED_BYTES_MAX = 32 * 1024
"""Other providers list many ways to pay in one header, so a buyer reads more than it sends."""

Model = TypeVar("Model", bound=BaseModel)


def encode_header(message: BaseModel) -> str:
    """Writes a message as a header value."""
    return b64_encode(dumps(as_json(message)))


def decode_header(model: type[Model], value: bytes, bytes_max: int) -> Model:
    """Reads a header value, or raises `Malformed`; nothing longer than `bytes_max` is decoded."""
    if len(value) > bytes_max:
        raise Malformed(f"the payment header is longer than {bytes_max} bytes")
    return parse(model, b64_decode(value))

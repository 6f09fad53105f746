"""The x402 V2 objects as they cross the wire, and what our binding puts inside them.

camelCase on the wire, snake_case here; strict types, so that `true` is never 1. Objects that belong
to x402 ignore keys they do not know, as that protocol's own parts do; the inner payload, which is
ours, refuses them. `docs/protocol.md`, Messages.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from x402mw.core.amounts import AMOUNT_MAX
from x402mw.core.errors import Malformed
from x402mw.core.strict import loads_object
from x402mw.core.vouchers import WIRE_CHARACTERS

Text = Annotated[str, Field(max_length=2048)]
Short = Annotated[str, Field(max_length=128)]
Number = Annotated[int, Field(ge=0, le=AMOUNT_MAX)]
Version = Annotated[int, Field(ge=2, le=2, alias="x402Version")]
"""Not `Literal[2]`, which would also take 2.0."""


class _Message(BaseModel):
    model_config = ConfigDict(
        strict=True, frozen=True, extra="ignore", alias_generator=to_camel, validate_by_name=True
    )


class ResourceInfo(_Message):
    """What is sold."""

    url: Text
    description: Text | None = None
    mime_type: Short | None = None


class PaymentRequirements(_Message):
    """One way to pay: an entry of `accepts`. `amount` is in atomic units."""

    scheme: Short
    network: Short
    asset: Short
    amount: Short
    pay_to: Text
    max_timeout_seconds: Annotated[int, Field(ge=0, lt=2**32)]
    extra: dict[str, Any] = Field(default_factory=dict)


class EscrowExtra(_Message):
    """The keys of `extra` in the escrow binding; more keys may stand beside them."""

    escrow: Text
    journal: Short
    terms: Short
    route: Text
    binding: Annotated[int, Field(ge=0, le=255)]
    control: Text
    suggested_deposit: Short = "0"
    unit: Short = ""
    unit_price: Short = "0"
    per: Number = 0
    base: Short = "0"


class PaymentRequired(_Message):
    """The content of `PAYMENT-REQUIRED`. Offers stay raw: only those we know are read further."""

    x402_version: Version
    error: str | None = None
    resource: ResourceInfo | None = None
    accepts: Annotated[list[dict[str, Any]], Field(max_length=64)]


class EscrowPayload(BaseModel):
    """The inner payload of the escrow binding. `expires` is in milliseconds."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    voucher: Annotated[str, Field(min_length=WIRE_CHARACTERS, max_length=WIRE_CHARACTERS)]
    token: Annotated[str, Field(max_length=2048)]
    expires: Number
    binding: Annotated[int, Field(ge=0, le=255)]


class PaymentPayload(_Message):
    """The content of `PAYMENT-SIGNATURE`. `accepted` stays raw, to be compared with our offer."""

    x402_version: Version
    payload: EscrowPayload
    accepted: dict[str, Any]


class SettlementExtra(_Message):
    """The provider's account of a call; numbers that may exceed 2^53 are strings of digits.

    `state`: "refused" (nothing recorded), "running", "open" (answer begun), or "settled". `final`
    on a refusal tells that these very bytes can never be admitted.
    """

    seq: Short
    state: Literal["refused", "running", "open", "settled"]
    charged_total: Short | None = None
    open_total: Short | None = None
    final: bool = False
    voucher: Annotated[str, Field(max_length=WIRE_CHARACTERS)] | None = None


class SettlementResponse(_Message):
    """The content of `PAYMENT-RESPONSE`. `success` is true whenever the call was admitted."""

    success: bool
    transaction: Short
    network: Short
    payer: Text | None = None
    amount: Short | None = None
    error_reason: Short | None = None
    error_message: Text | None = None
    extra: SettlementExtra | None = None


Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], raw: bytes) -> Model:
    """Reads strict JSON into a message, or raises `Malformed` naming the first wrong field."""
    return validate(model, loads_object(raw))


def validate(model: type[Model], value: Any) -> Model:
    """Checks already decoded JSON against a message, or raises `Malformed`."""
    try:
        return model.model_validate(value, by_alias=True, by_name=False)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:200] or "object"
        raise Malformed(f"{where}: {first['msg']}") from None


def as_json(message: BaseModel) -> dict[str, Any]:
    """Turns a message into plain JSON values; absent fields are left out, as x402 parts expect."""
    return message.model_dump(mode="json", by_alias=True, exclude_none=True)

"""Bodies about manual escrows, in both dialects: each field has one name, and known other ones.

The dialect of `amount_usdc` numbers, `provider` and `description` is read as if it had been written
in the other (`docs/escrow.md`, Dialects). Durations come under three names, of which exactly one
may be given: `auto_release_*` says by its name who gets the rest.
"""

from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    InstanceOf,
    WithJsonSchema,
    model_validator,
)

from x402mw.core.amounts import AMOUNT_MAX, USDC, Atomic, atomic, parse_display, parse_number, whole
from x402mw.escrow.bodies import (
    AMOUNT_FORM,
    EXPIRES_SECONDS_MAX,
    AgentId,
    Amount,
    Body,
    Memo,
    Name,
    PublicKey,
    ReferralCode,
    checked,
    positive,
    printable,
)
from x402mw.escrow.rules.values import REFUND, RELEASE

EXPIRES_SECONDS_DEFAULT = 30 * 24 * 60 * 60
MILESTONES_MAX = 50
PAYEES_MAX = 20
TEXT_CHARACTERS_MAX = 4000
PROOFS_CHARACTERS_MAX = 20_000
"""All those of one escrow together: each answer about it repeats them."""

HOUR_SECONDS = 3600
HOURS_MAX = EXPIRES_SECONDS_MAX // HOUR_SECONDS


def _exact(value: object) -> Fraction:
    """Display units, exactly, from a decimal string or a JSON number."""
    return parse_display(value) if isinstance(value, str) else parse_number(value)


def _units(value: object) -> Fraction:
    units = _exact(value) * USDC.unit
    atomic(units // 1)
    return units


def _whole(value: object) -> Atomic:
    return whole(_exact(value))


def _lines(text: str) -> str:
    printable(text.replace("\n", ""))
    return text


_EITHER_FORM = WithJsonSchema(
    {
        "anyOf": [
            {name: AMOUNT_FORM[name] for name in ("type", "maxLength", "pattern")},
            {"type": "number", "minimum": 0, "maximum": AMOUNT_MAX // USDC.unit},
        ],
        "examples": ["10.00"],
        "description": "Display units, as a decimal string or a number.",
    }
)
Units = Annotated[InstanceOf[Fraction], BeforeValidator(checked(_units)), _EITHER_FORM]
"""Atomic units with what is finer than one (M4)."""
PositiveUnits = Annotated[Units, AfterValidator(positive)]
Whole = Annotated[Atomic, BeforeValidator(checked(_whole)), _EITHER_FORM]
PositiveWhole = Annotated[Whole, AfterValidator(positive)]
Words = Annotated[str, Field(max_length=TEXT_CHARACTERS_MAX), AfterValidator(_lines)]
"""What people write to each other. It leaves only as JSON, where a line break breaks no line."""
Seconds = Annotated[int, Field(ge=1, le=EXPIRES_SECONDS_MAX)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Dialect(Body):
    """A body that is also understood under the names of the other dialect."""

    OTHER_NAMES: ClassVar[dict[str, str]] = {
        "amount_usdc": "amount",
        "provider": "to_agent_id",
        "recipient": "to_agent_id",
        "description": "memo",
    }

    @model_validator(mode="before")
    @classmethod
    def _translate(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        found: dict[str, Any] = {}
        for name, given in value.items():
            own = cls.OTHER_NAMES.get(name, name)
            own = own if own in cls.model_fields else name
            if own in found:
                raise ValueError(f"{own} is given twice, under two names")
            found[own] = given
        return found


class Milestone(Dialect):
    """One milestone of a new escrow."""

    name: Name
    amount: PositiveWhole


def _fraction(text: object) -> Fraction:
    return parse_display(text)


class Payee(Body):
    """Who gets which fraction (a decimal string, above 0 and up to 1) of what is earned."""

    agent_id: AgentId
    fraction: Annotated[
        InstanceOf[Fraction],
        BeforeValidator(checked(_fraction)),
        WithJsonSchema({**AMOUNT_FORM, "examples": ["1"], "description": "Above 0 and up to 1."}),
    ]


class Condition(Body):
    """An outcome fixed beforehand: its hash, or the key of the oracle that will sign it."""

    sha256: Sha256 | None = None
    oracle_key: PublicKey | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.sha256 is None) == (self.oracle_key is None):
            raise ValueError("a condition is either sha256 or oracle_key")
        return self


def _hours(value: object) -> Fraction:
    # Read as amounts are, which bounds what a stranger's exponent makes us expand.
    hours = parse_number(value)
    if not 0 < hours <= HOURS_MAX:
        raise ValueError(f"a time is above 0 and up to {HOURS_MAX} hours")
    return hours


class Lifetime(Dialect):
    """How long, under one of three names; none is 30 days."""

    auto_release_seconds: Seconds | None = None
    auto_release_hours: Annotated[
        InstanceOf[Fraction],
        BeforeValidator(checked(_hours)),
        WithJsonSchema({"type": "number", "exclusiveMinimum": 0, "maximum": HOURS_MAX}),
    ] | None = None  # fmt: skip
    expires_in_seconds: Seconds | None = None

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        given = (self.auto_release_seconds, self.auto_release_hours, self.expires_in_seconds)
        if sum(one is not None for one in given) > 1:
            raise ValueError(
                "give one of auto_release_seconds, auto_release_hours, expires_in_seconds"
            )
        if not 1 <= self.seconds <= EXPIRES_SECONDS_MAX:
            raise ValueError(f"the time lies between 1 second and {EXPIRES_SECONDS_MAX}")
        return self

    @property
    def seconds(self) -> int:
        """The time in whole seconds."""
        if self.auto_release_hours is not None:
            seconds = self.auto_release_hours * HOUR_SECONDS
            if seconds.denominator != 1:
                raise ValueError("auto_release_hours must come to whole seconds")
            return seconds.numerator
        for given in (self.auto_release_seconds, self.expires_in_seconds):
            if given is not None:
                return given
        return EXPIRES_SECONDS_DEFAULT

    @property
    def releases(self) -> bool:
        """Whether the name alone says that the provider gets the rest."""
        return self.auto_release_seconds is not None or self.auto_release_hours is not None


class NewManual(Lifetime):
    """`POST /escrow` without a session key."""

    to_agent_id: AgentId
    amount: PositiveWhole
    memo: Memo = ""
    on_expiry: Literal["release", "refund"] | None = None
    review_seconds: Annotated[int, Field(ge=1, le=EXPIRES_SECONDS_MAX)] | None = None
    milestones: Annotated[list[Milestone], Field(max_length=MILESTONES_MAX)] = Field(
        default_factory=list
    )
    payees: Annotated[list[Payee], Field(max_length=PAYEES_MAX)] = Field(default_factory=list)
    condition: Condition | None = None
    referral_code: ReferralCode | None = None
    low_balance: Amount | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        names = [milestone.name for milestone in self.milestones]
        if len(set(names)) != len(names):
            raise ValueError("milestones have different names")
        if sum(milestone.amount for milestone in self.milestones) > self.amount:
            raise ValueError("the milestones come to more than the amount")
        agents = [payee.agent_id for payee in self.payees]
        if len(set(agents)) != len(agents):
            raise ValueError("payees are different agents")
        if self.payees and sum(payee.fraction for payee in self.payees) != 1:
            raise ValueError("the payees' fractions sum to 1")
        if any(payee.fraction == 0 for payee in self.payees):
            raise ValueError("a payee's fraction is above 0")
        return self

    @property
    def after_expiry(self) -> str:
        """Who gets the rest: as said, or as the name of the time says (T3)."""
        return self.on_expiry or (RELEASE if self.releases else REFUND)


class Pay(Dialect):
    """`POST /escrow/{id}/release`: an amount, a total, a milestone, or everything."""

    amount: PositiveUnits | None = None
    cumulative: Units | None = None
    milestone: Name | None = None
    to_agent_id: AgentId | None = None
    memo: Memo = ""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if sum(one is not None for one in (self.amount, self.cumulative, self.milestone)) > 1:
            raise ValueError("give one of amount, cumulative, milestone; or none, for everything")
        return self


class PayPart(Pay):
    """`POST /escrow/{id}/release-partial`: the same, but never everything by omission."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.amount is None and self.cumulative is None and self.milestone is None:
            raise ValueError("amount is missing")
        return self


class Grow(Dialect):
    """`POST /escrow/{id}/topup`."""

    amount: PositiveWhole


class TakeBack(Dialect):
    """`POST /escrow/{id}/refund`: so much, or everything that may go back."""

    amount: PositiveWhole | None = None
    memo: Memo = ""


class Return(Dialect):
    """`POST /escrow/{id}/return`: the provider's own money."""

    amount: PositiveWhole
    memo: Memo = ""


class Settlement(Body):
    """`POST /escrow/{id}/settle`: both at once."""

    release: Whole
    refund: Whole

    @model_validator(mode="after")
    def _something(self) -> Self:
        checked(atomic)(self.release + self.refund)
        if self.release + self.refund == 0:
            raise ValueError("nothing would move")
        return self


class Delivery(Body):
    """`POST /escrow/{id}/deliver`."""

    milestone: Name | None = None
    proof: Annotated[
        Words,
        Field(
            description=f"All proofs of an escrow have at most {PROOFS_CHARACTERS_MAX} characters."
        ),
    ] = ""


class Verdict(Body):
    """`POST /escrow/{id}/approve` and `/reject`."""

    milestone: Name | None = None
    reason: Words = ""


class Outcome(Body):
    """`POST /escrow/{id}/condition`: the outcome, and the oracle's signature over it."""

    outcome: Annotated[str, Field(max_length=TEXT_CHARACTERS_MAX)]
    signature: Annotated[str, Field(max_length=100)] | None = None


class NewDispute(Dialect):
    """`POST /escrow/{id}/dispute`."""

    amount: PositiveWhole | None = None
    milestone: Name | None = None
    reason: Annotated[Words, Field(min_length=1)]
    evidence: Words = ""


class Evidence(Body):
    """`POST /escrow/{id}/dispute/evidence`."""

    content: Annotated[Words, Field(min_length=1)]


class Decision(Body):
    """`POST /escrow/{id}/dispute/resolve`: the shares of what is disputed."""

    to_provider: Whole
    to_buyer: Whole
    reason: Words = ""


class Extension(Body):
    """`POST /escrow/{id}/extend`: how much later it ends."""

    seconds: Annotated[int, Field(ge=1, le=EXPIRES_SECONDS_MAX)]

"""What the operations answer, as models: for the OpenAPI document and for tests, not for serving.

Answers are made as plain dictionaries by the operations; every answer that a test of the escrow
sees is held against these. Fields may be added to any of them one day, so the document allows more.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from x402mw.escrow.account_bodies import Mode
from x402mw.escrow.words import Kind, Status

_HEX = "[0-9a-f]{32}"


def _id(prefix: str, digit: str) -> Any:
    return Field(pattern=f"^{prefix}_{_HEX}$", examples=[f"{prefix}_{digit * 32}"])


AgentId = Annotated[str, _id("ag", "a")]
EscrowId = Annotated[str, _id("esc", "e")]
JournalId = Annotated[str, _id("jr", "1")]
KeyId = Annotated[str, _id("key", "c")]
TransferId = Annotated[str, _id("tr", "7")]
WebhookId = Annotated[str, _id("wh", "9")]
Money = Annotated[str, Field(pattern=r"^[0-9]{1,13}\.[0-9]{2,6}$", examples=["10.00"])]
Seconds = Annotated[int, Field(ge=0, examples=[1_800_000_000])]
Count = Annotated[int, Field(ge=0)]
Secret = Annotated[str, Field(pattern="^pf_(live|test)_[A-Za-z0-9_-]{43}$")]
NextNumber = Annotated[str, Field(pattern="^[0-9]{1,19}$")] | None
"""The `after` of the following page, null on the last one."""


def _allow_more(schema: dict[str, Any]) -> None:
    schema.pop("additionalProperties", None)


class Answer(BaseModel):
    """The body of an answer."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=_allow_more)


# Escrows.


class Escrow(Answer):
    """An escrow. `remaining` is what it still holds: amount - released - refunded.

    A dispute holds `disputed` of that back, never of a session. A manual escrow has no
    `session_key` and no `journal`: they are null.
    """

    escrow_id: EscrowId
    kind: Kind
    status: Status
    from_agent_id: AgentId
    to_agent_id: AgentId
    asset: str
    mode: Mode
    amount: Money
    released: Money
    redeemed: Money
    refunded: Money
    returned: Money
    disputed: Money
    remaining: Money
    fee: Money
    session_key: Annotated[str, Field(pattern="^[A-Za-z0-9_-]{43}$")] | None
    journal: JournalId | None
    memo: str
    on_expiry: Literal["release", "refund"]
    created_at: Seconds
    expires_at: Seconds
    claim_until: Seconds | None
    closing_deadline: Seconds | None
    close_reason: str | None


class Session(Escrow):
    """A session, with a fresh token."""

    token: str


class Part(Answer):
    """A milestone, or the one delivery of an escrow without milestones."""

    name: str
    amount: Money
    state: Literal["pending", "delivered", "rejected", "paid"]
    proof: str
    review_until: Seconds | None


class OpenDispute(Answer):
    """What is disputed now."""

    number: Count
    opened_by: AgentId
    amount: Money
    opened_at: Seconds
    deadline: Seconds


class ManualEscrow(Escrow):
    """An escrow that its buyer releases by hand. `carried_units` are fractions not yet paid."""

    carried_units: Annotated[str, Field(pattern="^[0-9]+(/[0-9]+)?$")]
    review_seconds: Count | None
    milestones: list[Part]
    delivery: Part | None
    dispute: OpenDispute | None


class Escrows(Answer):
    """A page of escrows."""

    items: list[Escrow]
    next: NextNumber


class ConditionMet(Answer):
    """The outcome is the one that was agreed on; the provider is paid."""

    escrow_id: EscrowId
    met: Literal[True]


class Dispute(Answer):
    """A dispute, between whom, and over which milestone, if it is about one."""

    escrow_id: EscrowId
    number: Count
    status: str
    from_agent_id: AgentId
    to_agent_id: AgentId
    milestone: str | None
    opened_by: AgentId
    reason: str
    amount: Money
    opened_at: Seconds
    deadline: Seconds
    to_provider: Money
    to_buyer: Money
    decided_at: Seconds | None


class Disputes(Answer):
    """A page of open disputes."""

    items: list[Dispute]
    next: str | None


class Statement(Answer):
    """What a party had to say."""

    agent_id: AgentId
    content: str
    created_at: Seconds


class Case(Dispute):
    """A dispute with all that was said in it, and the escrow as its parties see it."""

    evidence: list[Statement]
    agreement: ManualEscrow


class Cases(Answer):
    """A page of an escrow's disputes."""

    items: list[Case]
    next: str | None


class Line(Answer):
    """What one entry of the books moved; `actor` is who did it, null if time did."""

    id: Annotated[str, Field(pattern="^[0-9]{1,19}$")]
    kind: str
    actor: str | None
    at: Seconds
    effective_at: Seconds
    locked: Money
    released: Money
    fee: Money
    refunded: Money
    returned: Money
    data: dict[str, Any]


class History(Answer):
    """A page of what happened to an escrow."""

    items: list[Line]
    next: NextNumber


# Vouchers.


class Counted(Answer):
    """An item that counts, and the state its session came to."""

    ok: Literal[True]
    escrow_id: EscrowId
    redeemed: Money
    released: Money
    deposit: Money
    state: Status


class NotCounted(Answer):
    """An item that does not count, and why."""

    ok: Literal[False]
    code: Literal[
        "malformed",
        "wrong_network",
        "unknown_session",
        "signature",
        "voucher_required",
        "invalid_state",
    ]
    detail: str


class Redeemed(Answer):
    """One verdict for each item, in order, and the highest serial shown before."""

    serial: Count
    items: list[Counted | NotCounted]


class Change(Answer):
    """A session after its last change."""

    escrow_id: EscrowId
    state: Status
    deposit: Money
    redeemed: Money
    released: Money
    claim_until: Seconds | None


class ChangeList(Answer):
    """Sessions by their last change; `next` is the following `since`."""

    next: Count
    serial: Count
    changes: list[Change]

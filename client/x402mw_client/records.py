"""What the escrow's answers hold, as values: one model for each.

Amounts are atomic units (`Atomic`, whole numbers) whatever text they came in, times whole seconds
since the epoch; ids of escrows and journals raw bytes, those of agents, keys and transfers text.
"""

from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from x402mw.core import ids
from x402mw.core.amounts import ZERO, Atomic, to_atomic, to_atomic_floor
from x402mw.core.keys import PUBLIC_KEY_BYTES
from x402mw.core.signed import reads
from x402mw.core.strict import b64url_decode

Amount = Annotated[Atomic, reads(to_atomic)]
# A manual escrow may carry a fraction of a unit; whole units are what moves.
Whole = Annotated[Atomic, reads(to_atomic_floor)]
SessionId = Annotated[bytes, reads(lambda text: ids.parse_id(ids.ESCROW, text))]
JournalId = Annotated[bytes, reads(lambda text: ids.parse_id(ids.JOURNAL, text))]
Key = Annotated[bytes, reads(lambda text: b64url_decode(text, PUBLIC_KEY_BYTES))]


# A manual escrow has none; older answers say so by an empty text.
Empty = BeforeValidator(lambda value: None if value == "" else value)

T = TypeVar("T", bound=BaseModel)


class Answer(BaseModel):
    """An answer of the escrow."""

    # The escrow may learn to say more before its clients learn to listen.
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", validate_by_name=True)


class Health(Answer):
    """Whether the escrow works, and its clock."""

    status: str
    network: str
    time: int


class EscrowKeys(Answer):
    """The escrow's network, root key, and its key set as signed text (`tokens.open_key_set`)."""

    network: str
    root_key: Key
    key_set: str


class EscrowCounts(Answer):
    """How many escrows there are, roughly."""

    open: int
    ended: int


class Stats(Answer):
    """What anybody may know: the terms, by mode, and figures of live money with one digit.

    `released` is in whole display units, `counted_at` when the figures were made.
    """

    network: str
    asset: str
    fee_bps: int
    min_escrow: dict[str, Amount]
    faucet: dict[str, Amount]
    agents: int
    escrows: EscrowCounts
    released: int
    counted_at: int


class NewAgent(Answer):
    """A fresh account; the API key is shown this once."""

    agent_id: str
    api_key: str = Field(repr=False)
    name: str
    handle: str | None = None
    tenant: str = ""
    mode: str = "live"
    balance: Amount


class ApiKey(Answer):
    """One API key of an agent, without its secret."""

    key_id: str
    name: str = ""
    scopes: list[str]
    created_at: int
    expires_at: int | None = None
    revoked_at: int | None = None


class NewApiKey(ApiKey):
    """A fresh API key, shown this once; `replaces` works until `replaced_until` if it rotated."""

    api_key: str = Field(repr=False)
    replaces: str | None = None
    replaced_until: int | None = None


class ApiKeys(Answer):
    """The keys of an agent that work, newest first."""

    items: list[ApiKey]


class Agent(Answer):
    """The account behind our API key."""

    agent_id: str
    name: str
    handle: str | None = None
    tenant: str = ""
    mode: str = "live"
    balance: Amount
    referrer: str | None = None
    created_at: int
    revoked_at: int | None = None
    keys: list[ApiKey] = Field(default_factory=list)


class Handle(Answer):
    """Which agent of our tenant is called so."""

    agent_id: str
    handle: str
    name: str


class Revoked(Answer):
    """An agent that trades no more, and since when."""

    agent_id: str
    revoked_at: int


class Claimed(Answer):
    """What the faucet gave."""

    claimed: Amount
    balance: Amount


class Journal(Answer):
    """A registered journal of a provider."""

    journal: JournalId
    agent_id: str
    receipt_key: Key


class Transfer(Answer):
    """Money that went from one agent to another, without an escrow and without a fee."""

    transfer_id: str
    from_agent_id: str
    to_agent_id: str
    asset: str
    mode: str = "live"
    amount: Amount
    memo: str = ""
    created_at: int


class Booking(Answer):
    """One line of the operator's bank; `balance` is what the agent has now, or fees come to."""

    reference: str
    kind: str
    agent_id: str | None = None
    amount: Amount
    balance: Amount
    created_at: int


class Milestone(Answer):
    """A part of a manual escrow: `state` is pending, delivered, rejected or paid.

    A delivery that nobody answers until `review_until` is paid.
    """

    name: str = ""
    amount: Whole
    state: str
    proof: str = ""
    review_until: int | None = None


class OpenDispute(Answer):
    """What is held back of an escrow until somebody decides, at the latest at `deadline`."""

    number: int
    opened_by: str
    amount: Amount
    opened_at: int
    deadline: int


class DisputeRecord(OpenDispute):
    """A dispute, between whom, and over which milestone, if it is about one."""

    escrow: SessionId = Field(alias="escrow_id")
    status: str
    from_agent_id: str = ""
    to_agent_id: str = ""
    milestone: str | None = None
    reason: str = ""
    to_provider: Amount = ZERO
    to_buyer: Amount = ZERO
    decided_at: int | None = None


class Statement(Answer):
    """What a party had to say in a dispute."""

    agent_id: str
    content: str
    created_at: int


class EscrowRecord(Answer):
    """One escrow of either `kind`. `deposit` is what was locked in all, `remaining` what is held.

    `released` is gross, before the fee; `redeemed` the most that vouchers proved; `returned` what
    the provider gave back of its own. `token` is the session token if one came. `carried_units` is
    the fraction of a unit that waits for the next release. `milestones`, `delivery` (of an escrow
    without milestones) and `dispute` come with answers about one manual escrow, not in listings.
    """

    session: SessionId = Field(alias="escrow_id")
    kind: str = "session"
    status: str
    from_agent_id: str
    to_agent_id: str
    asset: str
    mode: str = "live"
    deposit: Amount = Field(alias="amount")
    released: Whole
    refunded: Whole
    returned: Whole = ZERO
    remaining: Whole
    disputed: Whole = ZERO
    fee: Whole
    redeemed: Whole = ZERO
    session_key: Annotated[Key | None, Empty] = None
    journal: Annotated[JournalId | None, Empty] = None
    memo: str | None = None
    on_expiry: str | None = None
    created_at: int = 0
    expires_at: int
    claim_until: int | None = None
    closing_deadline: int | None = None
    close_reason: str | None = None
    token: str | None = Field(default=None, repr=False)
    carried_units: str = "0"
    review_seconds: int | None = None
    milestones: list[Milestone] = Field(default_factory=list)
    delivery: Milestone | None = None
    dispute: OpenDispute | None = None

    @property
    def escrow_id(self) -> str:
        """The id as text, `esc_` and 32 hex digits."""
        return ids.format_id(ids.ESCROW, self.session)

    @property
    def free(self) -> Atomic:
        """What is held and not disputed."""
        return Atomic(self.remaining - self.disputed)


class CaseRecord(DisputeRecord):
    """A dispute with all that was said in it, in order, and the escrow as its parties see it."""

    evidence: list[Statement] = []
    agreement: EscrowRecord | None = None


class Outcome(Answer):
    """The outcome that was presented is the one agreed on: the money has moved."""

    escrow: SessionId = Field(alias="escrow_id")
    met: bool


class Page(Answer, Generic[T]):
    """One page of a listing; `next` continues it (`after`)."""

    items: list[T]
    next: str | None = None


class HistoryLine(Answer):
    """One thing that happened to an escrow, and what it moved; `released` is before the `fee`.

    `actor` is an agent, "operator", or None for time. It was written at `at`, and counts since
    `effective_at` if that is another second.
    """

    id: str
    kind: str
    actor: str | None = None
    at: int
    effective_at: int | None = None
    locked: Amount
    released: Amount
    fee: Amount
    refunded: Amount
    returned: Amount = ZERO
    data: dict[str, Any] = Field(default_factory=dict)


class Webhook(Answer):
    """A URL that is told what happens; without `events` all kinds, without `escrow_id` all ours."""

    webhook_id: str
    url: str
    events: list[str]
    escrow_id: str | None = None
    status: str
    key_id: str | None = None
    created_at: int


class NewWebhook(Webhook):
    """A webhook with a fresh secret, shown this once."""

    secret: str = Field(repr=False)
    old_secret_until: int | None = None


class Webhooks(Answer):
    """All webhooks of an agent, oldest first."""

    items: list[Webhook]


class Delivery(Answer):
    """What became of telling one event to one webhook; `state` is waiting, delivered or dead."""

    event_id: str
    event: str
    escrow_id: str | None = None
    state: str
    attempts: int
    outcome: str | None = None
    created_at: int
    changed_at: int
    next_at: int | None = None


class Verdict(Answer):
    """What became of one item of a redemption; a refused one has a `code` and a `detail`."""

    ok: bool
    session: SessionId | None = Field(default=None, alias="escrow_id")
    redeemed: Whole | None = None
    released: Whole | None = None
    deposit: Amount | None = None
    state: str | None = None
    code: str | None = None
    detail: str | None = None


class Redeemed(Answer):
    """The verdicts in order, and the highest write serial the escrow had seen before this call."""

    serial: int
    items: list[Verdict]


class Change(Answer):
    """A session of one journal as it now stands."""

    session: SessionId = Field(alias="escrow_id")
    state: str
    deposit: Amount
    redeemed: Whole
    released: Whole
    claim_until: int | None = None


class Changes(Answer):
    """What changed since a cursor; `next` is the new cursor, `serial` as in `Redeemed`."""

    next: int
    serial: int
    changes: list[Change]

"""What the operations on agents, keys, transfers and webhooks answer; `answers` says more."""

from typing import Annotated, Literal

from pydantic import Field

from x402mw.escrow.account_bodies import Mode, Scope
from x402mw.escrow.api.answers import (
    AgentId,
    Answer,
    Count,
    EscrowId,
    JournalId,
    KeyId,
    Money,
    NextNumber,
    Seconds,
    Secret,
    TransferId,
    WebhookId,
)

# The service.


class Health(Answer):
    """That the service answers, for which network, and what time it is there."""

    status: Literal["ok"]
    network: str
    time: Seconds


class SigningKeys(Answer):
    """The key set as a JWS by the root key."""

    network: str
    root_key: str
    key_set: str


class OfModes(Answer):
    """An amount for live and one for test money."""

    live: Money
    test: Money


class Counts(Answer):
    """How many escrows, about."""

    open: Count
    ended: Count


class Stats(Answer):
    """Terms, and figures rounded down to one digit."""

    network: str
    asset: str
    fee_bps: Annotated[int, Field(ge=0, le=10_000)]
    min_escrow: OfModes
    faucet: OfModes
    agents: Count
    escrows: Counts
    released: Count
    counted_at: Seconds


# Agents.


class Key(Answer):
    """A key without its secret."""

    key_id: KeyId
    name: str
    scopes: list[Scope]
    created_at: Seconds
    expires_at: Seconds | None
    revoked_at: Seconds | None


class Keys(Answer):
    """All keys that work; an agent has few."""

    items: list[Key]


class MadeKey(Answer):
    """A new key. Its secret `api_key` is shown this once."""

    key_id: KeyId
    name: str
    scopes: list[Scope]
    created_at: Seconds
    api_key: Secret


class RotatedKey(MadeKey):
    """The new key, and until when the old one works."""

    replaces: KeyId
    replaced_until: Seconds


class MadeAgent(Answer):
    """A new agent. Its first key `api_key` is shown this once."""

    agent_id: AgentId
    name: str
    handle: str | None
    tenant: str
    mode: Mode
    balance: Money
    api_key: Secret


class Agent(Answer):
    """An agent as its tenant sees it."""

    agent_id: AgentId
    name: str
    handle: str | None
    tenant: str
    mode: Mode
    balance: Money
    referrer: AgentId | None
    created_at: Seconds
    revoked_at: Seconds | None


class Self(Agent):
    """An agent as it sees itself."""

    keys: list[Key]


class Agents(Answer):
    """A page of agents."""

    items: list[Agent]
    next: AgentId | None


class Handle(Answer):
    """Which agent is called so."""

    agent_id: AgentId
    handle: str
    name: str


class RevokedAgent(Answer):
    """All its keys are dead; its open sessions are closing."""

    agent_id: AgentId
    revoked_at: Seconds
    sessions_closing: Count


class Claimed(Answer):
    """First money."""

    claimed: Money
    balance: Money


class Journal(Answer):
    """A provider's book."""

    journal: JournalId
    agent_id: AgentId
    receipt_key: str


class Booking(Answer):
    """One line of a bank, booked; `balance` is what the agent has now, or the fees come to."""

    reference: str
    kind: Literal["deposit", "withdrawal", "fees"]
    agent_id: AgentId | None
    amount: Money
    balance: Money
    created_at: Seconds


class Transfer(Answer):
    """Money that one agent sent another."""

    transfer_id: TransferId
    from_agent_id: AgentId
    to_agent_id: AgentId
    asset: str
    mode: Mode
    amount: Money
    memo: str
    created_at: Seconds


class Transfers(Answer):
    """A page of transfers."""

    items: list[Transfer]
    next: NextNumber


# Webhooks.


class Webhook(Answer):
    """A webhook; no `events` means all of them. It ends with the key that made it."""

    webhook_id: WebhookId
    url: str
    events: list[str]
    escrow_id: EscrowId | None
    status: Literal["active", "failing", "ended"]
    key_id: KeyId | None
    created_at: Seconds


class Webhooks(Answer):
    """All webhooks of an agent; there are few."""

    items: list[Webhook]


class MadeWebhook(Webhook):
    """A new webhook; its secret is shown this once."""

    secret: str


class RotatedWebhook(MadeWebhook):
    """A webhook with its next secret; the old one also signs until then."""

    old_secret_until: Seconds


EventId = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?$", examples=["812.1"])]


class SentEvent(Answer):
    """One event on its way to a webhook."""

    event_id: EventId
    event: str
    escrow_id: EscrowId | None
    state: Literal["waiting", "delivered", "dead"]
    attempts: Count
    outcome: str | None
    created_at: Seconds
    changed_at: Seconds
    next_at: Seconds | None


class Deliveries(Answer):
    """A page of what a webhook was told."""

    items: list[SentEvent]
    next: EventId | None

"""The tables, as queries know them.

What the database itself enforces (checks, keys, triggers) is written in `migrations/`; a test
compares the two. All amounts and times are BIGINT: atomic units and whole seconds.
"""

from typing import Any

from sqlalchemy import BigInteger, Column, MetaData, Table, Text

metadata = MetaData()


def _table(name: str, *, text: str, numbers: str = "", nullable: str = "") -> Table:
    """A table of text columns and integer columns, each list separated by spaces."""
    optional = set(nullable.split())
    columns: list[Column[Any]] = [
        Column(column, Text, nullable=column in optional) for column in text.split()
    ]
    columns += [
        Column(column, BigInteger, nullable=column in optional) for column in numbers.split()
    ]
    return Table(name, metadata, *columns)


service = _table(
    "service",
    text="network root_key entry_hash",
    numbers="id entry_seq change_seq heartbeat up_since key_serial",
)
"""One row: who this service is, the heads of its sequences, and when it was last alive.

Every writing transaction locks it first, so entries have one order and changes are seen in it.
"""

tenants = _table("tenants", text="tenant mode", numbers="created_at")
"""Who runs agents here; the name is the key. Test and live tenants never trade with each other."""

agents = _table(
    "agents",
    text="agent_id name tenant handle referrer",
    numbers="created_at revoked_at",
    nullable="handle referrer revoked_at",
)

api_keys = _table(
    "api_keys",
    text="key_id agent_id key_hash scopes name",
    numbers="created_at expires_at revoked_at",
    nullable="expires_at revoked_at",
)
"""A key is dead once it has a `revoked_at`, whatever the clock says, or when `expires_at` came."""

bookings = _table(
    "bookings",
    text="reference kind agent_id operator",
    numbers="amount created_at",
    nullable="agent_id",
)
"""What the operator booked for the world outside: one row for each line of a bank.

Only its own fees are of no agent.
"""

transfers = _table(
    "transfers",
    text="transfer_id sender recipient asset memo",
    numbers="amount number created_at",
)

accounts = _table("accounts", text="account asset", numbers="balance")

entries = _table(
    "entries",
    text="kind escrow_id asset actor data previous_hash hash",
    numbers="seq created_at effective_at before",
    nullable="escrow_id actor data before",
)

checkpoints = _table("checkpoints", text="hash signature", numbers="seq created_at")
"""What the chain's hash was at some of its entries, signed. `docs/audit.md`."""

postings = _table("postings", text="source target", numbers="seq line amount")

escrows = _table(
    "escrows",
    text=(
        "escrow_id kind status buyer provider asset session_key journal memo on_expiry close_reason"
        " referrer payees"
    ),
    numbers=(
        "amount released redeemed refunded disputed returned fee referral fee_bps referral_bps"
        " created_at expires_at claim_until closing_deadline due_at opened change"
        " last_entry low_balance"
    ),
    nullable="journal claim_until closing_deadline due_at close_reason last_entry",
)

agreements = _table(
    "agreements",
    text="escrow_id carry condition",
    numbers="review_seconds",
    nullable="review_seconds",
)
"""What a manual escrow has beside its row; `carry` is an exact fraction of a unit, as text."""

parts = _table(
    "parts",
    text="escrow_id name state proof",
    numbers="number amount review_until",
    nullable="review_until",
)

disputes = _table(
    "disputes",
    text="escrow_id status opener reason arbiter",
    numbers="number amount opened_at deadline to_provider to_buyer part decided_at entry",
    nullable="arbiter part decided_at",
)

evidence = _table("evidence", text="escrow_id agent_id content", numbers="number line created_at")

journals = _table("journals", text="journal agent_id receipt_key", numbers="serial created_at")

signing_keys = _table(
    "signing_keys",
    text="key_id public_key proof",
    numbers="number created_at retired_at",
    nullable="retired_at proof",
)

idempotency = _table(
    "idempotency", text="principal route key body_hash answer", numbers="status created_at"
)

faucet_claims = _table("faucet_claims", text="agent_id source mode", numbers="day amount")

webhooks = _table(
    "webhooks",
    text="webhook_id agent_id url events status escrow_id key_id",
    numbers="created_at since generation old_until last_entry next_at waiting",
    nullable="escrow_id key_id old_until last_entry next_at",
)
"""Whom to tell, from after the entry `since`; up to `last_entry` if the agent has ended.

`waiting` counts the deliveries that wait. At `next_at` one of them is due, or was long ago.
"""

deliveries = _table(
    "deliveries",
    text="webhook_id escrow_id event state outcome body",
    numbers="seq part attempts changed_at next_at created_at",
    nullable="next_at outcome",
)
"""What webhooks are told. Of what waits, the first of each escrow and webhook has a `next_at`."""

deliverer = _table("deliverer", text="holder", numbers="id cursor held_until")
"""One row: which process delivers, and up to which entry deliveries were made."""

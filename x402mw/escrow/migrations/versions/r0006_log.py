"""Entries say who caused them and why, are signed now and then, and are told to webhooks.

Each entry names the one before it about the same escrow. Old entries stay as they were written,
because their hashes cover what they say: the history of an older escrow is linked from its newest
old entry on.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

AMOUNT_MAX = 2**63 - 1


def upgrade() -> None:
    """Adds columns, which leaves triggers and rows as they are."""
    for column in (_text("actor"), _text("data"), _number("before")):
        op.add_column("entries", column)
    op.add_column("escrows", _number("last_entry"))
    _add_low_balance()
    op.execute(
        "UPDATE escrows SET last_entry = newest.seq, low_balance = amount / 10"
        " FROM (SELECT escrow_id, max(seq) AS seq FROM entries GROUP BY escrow_id) AS newest"
        " WHERE newest.escrow_id = escrows.escrow_id"
    )
    op.add_column("signing_keys", _text("proof"))
    _create_checkpoints()
    _create_webhooks()


def _add_low_balance() -> None:
    check = f"low_balance BETWEEN 0 AND {AMOUNT_MAX}"
    if op.get_bind().dialect.name == "sqlite":
        check += " AND typeof(low_balance) = 'integer'"
    op.execute(
        f"ALTER TABLE escrows ADD COLUMN low_balance BIGINT DEFAULT 0 NOT NULL CHECK ({check})"
    )


def _create_checkpoints() -> None:
    op.create_table(
        "checkpoints",
        *(_needed(_number("seq")), _needed(_text("hash"))),
        *(_needed(_number("created_at")), _needed(_text("signature"))),
        sa.PrimaryKeyConstraint("seq"),
    )
    if op.get_bind().dialect.name != "sqlite":
        op.execute(
            "CREATE TRIGGER checkpoints_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON"
            " checkpoints FOR EACH STATEMENT EXECUTE FUNCTION x402mw_append_only()"
        )
        return
    refuse = "BEGIN SELECT RAISE(ABORT, 'the books are append-only'); END"
    for change in ("UPDATE", "DELETE"):
        name = f"checkpoints_no_{change.lower()}"
        op.execute(f"CREATE TRIGGER {name} BEFORE {change} ON checkpoints {refuse}")
    taken = "EXISTS (SELECT 1 FROM checkpoints WHERE seq = NEW.seq)"
    name = "checkpoints_no_replace BEFORE INSERT ON checkpoints"
    op.execute(f"CREATE TRIGGER {name} WHEN {taken} {refuse}")


def _create_webhooks() -> None:
    """Deliveries that wait have a `next_at`, but only the first of each escrow and webhook."""
    op.create_table(
        "webhooks",
        *(_needed(_text(name)) for name in ("webhook_id", "agent_id", "url", "events", "status")),
        *(_text("escrow_id"), _needed(_number("created_at")), _needed(_number("since"))),
        *(_needed(_number("generation")), _number("old_until")),
        sa.PrimaryKeyConstraint("webhook_id"),
        sa.ForeignKeyConstraint(["agent_id"], ["agents.agent_id"]),
    )
    op.create_index("webhooks_agent", "webhooks", ["agent_id"])
    op.create_table(
        "deliveries",
        *(_needed(_text(name)) for name in ("webhook_id", "escrow_id", "event", "state")),
        *(_needed(_number(name)) for name in ("seq", "part", "attempts", "changed_at")),
        *(_number("next_at"), _text("outcome")),
        *(_needed(_text("body")), _needed(_number("created_at"))),
        sa.PrimaryKeyConstraint("webhook_id", "seq", "part"),
        sa.ForeignKeyConstraint(["webhook_id"], ["webhooks.webhook_id"], ondelete="CASCADE"),
    )
    _index_some("deliveries_due", ["next_at"], "next_at IS NOT NULL")
    waiting = ["webhook_id", "escrow_id", "seq", "part"]
    _index_some("deliveries_waiting", waiting, "state = 'waiting'")
    _index_some("deliveries_done", ["changed_at"], "state <> 'waiting'")
    op.create_table(
        "deliverer",
        *(_needed(_number("id")), _needed(_number("cursor"))),
        *(_needed(_text("holder")), _needed(_number("held_until"))),
        sa.PrimaryKeyConstraint("id"),
        sa.CheckConstraint("id = 1"),
    )
    op.execute("INSERT INTO deliverer SELECT 1, coalesce(max(seq), 0), '', 0 FROM entries")


def _index_some(name: str, columns: list[str], where: str) -> None:
    some = sa.text(where)
    op.create_index(name, "deliveries", columns, sqlite_where=some, postgresql_where=some)


def _text(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.Text, nullable=True)


def _number(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=True)


def _needed(column: sa.Column[Any]) -> sa.Column[Any]:
    column.nullable = False
    return column


def downgrade() -> None:
    """Refuses: books are not taken back."""
    raise NotImplementedError

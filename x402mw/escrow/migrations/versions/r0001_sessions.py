"""Agents, books, session escrows, journals, keys, idempotency and the faucet.

The database is the second wall behind the rules in code: amounts are integers between 0 and 2^63-1
(SQLite would silently turn an overflow into a float, so it also checks the type), L, R, F and the
redeemed amount never fall, and what stands in the books can be neither changed nor deleted.
"""

from collections.abc import Iterable

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

AMOUNT_MAX = 2**63 - 1
NEVER_FALL = ("amount", "released", "redeemed", "refunded", "fee", "referral", "change")
APPEND_ONLY = ("entries", "postings")
ESCROW_AMOUNTS = ("amount", "released", "redeemed", "refunded", "fee", "referral")


def upgrade() -> None:
    """Creates everything."""
    _create_service()
    _create_agents()
    _create_books()
    _create_escrows()
    _create_helpers()
    if op.get_bind().dialect.name == "sqlite":
        _guard_sqlite()
    else:
        _guard_postgresql()


def _text(name: str, *, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.Text, nullable=nullable)


def _number(name: str, *, nullable: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=nullable)


def _number_checks(*names: str, least: int = 0) -> list[sa.CheckConstraint]:
    """Range checks, and on SQLite the type check that keeps floats out of amounts."""
    sqlite = op.get_bind().dialect.name == "sqlite"
    return [
        sa.CheckConstraint(
            f"{name} BETWEEN {least} AND {AMOUNT_MAX}"
            + (f" AND typeof({name}) = 'integer'" if sqlite else "")
        )
        for name in names
    ]


def _create_service() -> None:
    op.create_table(
        "service",
        _number("id"),
        _text("network"),
        _text("root_key"),
        _text("entry_hash"),
        *map(_number, ("entry_seq", "change_seq", "heartbeat", "up_since", "key_serial")),
        sa.PrimaryKeyConstraint("id"),
        sa.CheckConstraint("id = 1"),
        *_number_checks("entry_seq", "change_seq", "heartbeat", "up_since", "key_serial"),
    )


def _create_agents() -> None:
    op.create_table(
        "agents",
        _text("agent_id"),
        _text("name"),
        _text("key_hash"),
        _number("created_at"),
        sa.PrimaryKeyConstraint("agent_id"),
        sa.UniqueConstraint("key_hash"),
    )
    op.create_table(
        "journals",
        _text("journal"),
        _text("agent_id"),
        _text("receipt_key"),
        _number("serial"),
        _number("created_at"),
        sa.PrimaryKeyConstraint("journal"),
        sa.ForeignKeyConstraint(["agent_id"], ["agents.agent_id"]),
        *_number_checks("serial"),
    )


def _create_books() -> None:
    op.create_table(
        "accounts",
        _text("account"),
        _text("asset"),
        _number("balance"),
        sa.PrimaryKeyConstraint("account"),
        sa.CheckConstraint("balance >= 0 OR account = 'world'"),
        *_number_checks("balance", least=-AMOUNT_MAX),
    )
    op.create_table(
        "entries",
        _number("seq"),
        _text("kind"),
        _text("escrow_id", nullable=True),
        _text("asset"),
        _number("created_at"),
        _number("effective_at"),
        _text("previous_hash"),
        _text("hash"),
        sa.PrimaryKeyConstraint("seq"),
        sa.UniqueConstraint("hash"),
    )
    op.create_index("entries_escrow", "entries", ["escrow_id"])
    op.create_table(
        "postings",
        _number("seq"),
        _number("line"),
        _text("source"),
        _text("target"),
        _number("amount"),
        sa.PrimaryKeyConstraint("seq", "line"),
        sa.ForeignKeyConstraint(["seq"], ["entries.seq"]),
        sa.ForeignKeyConstraint(["source"], ["accounts.account"]),
        sa.ForeignKeyConstraint(["target"], ["accounts.account"]),
        sa.CheckConstraint("source <> target"),
        *_number_checks("amount", least=1),
    )


def _create_escrows() -> None:
    op.create_table(
        "escrows",
        *map(_text, ("escrow_id", "kind", "status", "buyer", "provider", "asset", "session_key")),
        *map(_text, ("journal", "memo", "on_expiry")),
        _text("close_reason", nullable=True),
        *map(_number, ESCROW_AMOUNTS),
        *map(_number, ("fee_bps", "referral_bps", "created_at", "expires_at")),
        _number("claim_until", nullable=True),
        _number("closing_deadline", nullable=True),
        _number("opened"),
        _number("change"),
        sa.PrimaryKeyConstraint("escrow_id"),
        sa.UniqueConstraint("opened"),
        sa.UniqueConstraint("journal", "change"),
        sa.ForeignKeyConstraint(["buyer"], ["agents.agent_id"]),
        sa.ForeignKeyConstraint(["provider"], ["agents.agent_id"]),
        sa.ForeignKeyConstraint(["journal"], ["journals.journal"]),
        sa.CheckConstraint("buyer <> provider"),
        sa.CheckConstraint("refunded <= amount - released"),
        sa.CheckConstraint("redeemed <= released"),
        sa.CheckConstraint("referral <= fee AND fee <= released"),
        sa.CheckConstraint("claim_until <= expires_at"),
        *_number_checks(*ESCROW_AMOUNTS),
    )
    op.create_index("escrows_buyer", "escrows", ["buyer", "opened"])
    op.create_index("escrows_provider", "escrows", ["provider", "opened"])
    live = sa.text("status IN ('locked', 'partially_released', 'closing')")
    op.create_index(
        "escrows_live",
        "escrows",
        [sa.text("coalesce(closing_deadline, expires_at)")],
        sqlite_where=live,
        postgresql_where=live,
    )


def _create_helpers() -> None:
    op.create_table(
        "signing_keys",
        _text("key_id"),
        _text("public_key"),
        _number("number"),
        _number("created_at"),
        _number("retired_at", nullable=True),
        sa.PrimaryKeyConstraint("number"),
        sa.UniqueConstraint("key_id"),
    )
    op.create_table(
        "idempotency",
        *map(_text, ("principal", "route", "key", "body_hash", "answer")),
        _number("status"),
        _number("created_at"),
        sa.PrimaryKeyConstraint("principal", "route", "key"),
    )
    op.create_index("idempotency_age", "idempotency", ["created_at"])
    op.create_table(
        "faucet_claims",
        _text("agent_id"),
        _text("source"),
        _number("day"),
        _number("amount"),
        sa.PrimaryKeyConstraint("agent_id"),
        sa.ForeignKeyConstraint(["agent_id"], ["agents.agent_id"]),
        *_number_checks("amount"),
    )
    op.create_index("faucet_day", "faucet_claims", ["day", "source"])


def _falls(names: Iterable[str]) -> str:
    return " OR ".join(f"NEW.{name} < OLD.{name}" for name in names)


def _guard_sqlite() -> None:
    for table in APPEND_ONLY:
        for change in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{change.lower()} BEFORE {change} ON {table}"
                f" BEGIN SELECT RAISE(ABORT, 'the books are append-only'); END"
            )
    # INSERT OR REPLACE deletes without asking the DELETE trigger, so it is stopped before.
    op.execute(
        "CREATE TRIGGER entries_no_replace BEFORE INSERT ON entries"
        " WHEN EXISTS (SELECT 1 FROM entries WHERE seq = NEW.seq OR hash = NEW.hash)"
        " BEGIN SELECT RAISE(ABORT, 'the books are append-only'); END"
    )
    op.execute(
        "CREATE TRIGGER postings_no_replace BEFORE INSERT ON postings"
        " WHEN EXISTS (SELECT 1 FROM postings WHERE seq = NEW.seq AND line = NEW.line)"
        " BEGIN SELECT RAISE(ABORT, 'the books are append-only'); END"
    )
    op.execute(
        f"CREATE TRIGGER escrows_never_fall BEFORE UPDATE ON escrows WHEN {_falls(NEVER_FALL)}"
        " BEGIN SELECT RAISE(ABORT, 'what an escrow has counted never falls'); END"
    )


def _guard_postgresql() -> None:
    op.execute(
        "CREATE FUNCTION x402mw_append_only() RETURNS trigger LANGUAGE plpgsql AS $$"
        " BEGIN RAISE EXCEPTION 'the books are append-only'; END $$"
    )
    for table in APPEND_ONLY:
        op.execute(
            f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table}"
            " FOR EACH STATEMENT EXECUTE FUNCTION x402mw_append_only()"
        )
    op.execute(
        "CREATE FUNCTION x402mw_never_fall() RETURNS trigger LANGUAGE plpgsql AS $$"
        f" BEGIN IF {_falls(NEVER_FALL)} THEN"
        " RAISE EXCEPTION 'what an escrow has counted never falls'; END IF; RETURN NEW; END $$"
    )
    op.execute(
        "CREATE TRIGGER escrows_never_fall BEFORE UPDATE ON escrows"
        " FOR EACH ROW EXECUTE FUNCTION x402mw_never_fall()"
    )


def downgrade() -> None:
    """Refuses: books are not taken back."""
    raise NotImplementedError

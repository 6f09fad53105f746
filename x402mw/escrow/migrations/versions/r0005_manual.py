"""Manual escrows: what they hold beside a session's columns, and one timer for both kinds.

`due_at` is when time next does something to an escrow, whatever that is; the index of live escrows
by their deadline becomes one by it. SQLite cannot add the checks to a table, so it writes it anew.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

AMOUNT_MAX = 2**63 - 1
LIVE = "status IN ('locked', 'partially_released', 'closing')"
DUE = f"CASE WHEN {LIVE} THEN coalesce(closing_deadline, expires_at) END"
NEVER_FALL = (
    *("amount", "released", "redeemed", "refunded", "returned", "fee", "referral"),
    *("expires_at", "change"),
)
KEPT = (
    "escrow_id, kind, status, buyer, provider, asset, session_key, journal, memo, on_expiry,"
    " close_reason, amount, released, redeemed, refunded, fee, referral, fee_bps, referral_bps,"
    " created_at, expires_at, claim_until, closing_deadline, opened, change"
)
NEW = ("disputed", "returned", "referrer", "payees", "due_at")


def upgrade() -> None:
    """Adds columns to escrows, and the tables of what only manual escrows have."""
    sqlite = op.get_bind().dialect.name == "sqlite"
    _drop_guards(sqlite=sqlite)
    if sqlite:
        _rewrite_escrows()
    else:
        _extend_escrows()
    op.create_index(
        "escrows_due",
        "escrows",
        ["due_at"],
        sqlite_where=sa.text("due_at IS NOT NULL"),
        postgresql_where=sa.text("due_at IS NOT NULL"),
    )
    _guard(sqlite=sqlite)
    _create_agreements()
    _create_disputes()


def _text(name: str, *, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.Text, nullable=nullable)


def _number(name: str, *, nullable: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=nullable)


def _amounts(*names: str) -> list[sa.CheckConstraint]:
    """Range checks, and on SQLite the type check that keeps floats out of amounts."""
    sqlite = op.get_bind().dialect.name == "sqlite"
    return [
        sa.CheckConstraint(
            f"{name} BETWEEN 0 AND {AMOUNT_MAX}"
            + (f" AND typeof({name}) = 'integer'" if sqlite else "")
        )
        for name in names
    ]


def _checks() -> list[sa.CheckConstraint]:
    return [
        *_amounts("disputed", "returned"),
        sa.CheckConstraint("disputed <= amount - released - refunded"),
        sa.CheckConstraint("returned <= released"),
        sa.CheckConstraint("kind = 'session' OR (journal IS NULL AND session_key = '')"),
        sa.CheckConstraint("kind = 'manual' OR (journal IS NOT NULL AND disputed = 0)"),
    ]


# PostgreSQL.


def _extend_escrows() -> None:
    for name in ("disputed", "returned"):
        op.add_column("escrows", sa.Column(name, sa.BigInteger, nullable=False, server_default="0"))
    for name in ("referrer", "payees"):
        op.add_column("escrows", sa.Column(name, sa.Text, nullable=False, server_default=""))
    op.add_column("escrows", _number("due_at", nullable=True))
    op.execute(f"UPDATE escrows SET due_at = {DUE}")  # noqa: S608 (own names)
    for name in ("disputed", "returned", "referrer", "payees"):
        op.alter_column("escrows", name, server_default=None)
    op.alter_column("escrows", "journal", nullable=True)
    for number, check in enumerate(_checks()):
        op.create_check_constraint(f"escrows_manual_{number}", "escrows", check.sqltext)


# SQLite.


def _rewrite_escrows() -> None:
    amounts = ("amount", "released", "redeemed", "refunded", "fee", "referral")
    op.create_table(
        "new_escrows",
        *map(_text, ("escrow_id", "kind", "status", "buyer", "provider", "asset", "session_key")),
        *(_text("journal", nullable=True), _text("memo"), _text("on_expiry")),
        *(_text("close_reason", nullable=True), _text("referrer"), _text("payees")),
        *map(_number, (*amounts, "disputed", "returned")),
        *map(_number, ("fee_bps", "referral_bps", "created_at", "expires_at")),
        _number("claim_until", nullable=True),
        _number("closing_deadline", nullable=True),
        _number("due_at", nullable=True),
        *(_number("opened"), _number("change")),
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
        *_amounts(*amounts),
        *_checks(),
    )
    op.execute(
        f"INSERT INTO new_escrows ({KEPT}, {', '.join(NEW)})"  # noqa: S608 (own names)
        f" SELECT {KEPT}, 0, 0, '', '', {DUE} FROM escrows"
    )
    op.drop_table("escrows")
    op.rename_table("new_escrows", "escrows")
    op.create_index("escrows_buyer", "escrows", ["buyer", "opened"])
    op.create_index("escrows_provider", "escrows", ["provider", "opened"])


# What never falls, and the new tables.


def _drop_guards(*, sqlite: bool) -> None:
    op.drop_index("escrows_live", "escrows")
    if sqlite:
        op.execute("DROP TRIGGER escrows_never_fall")
    else:
        op.execute("DROP TRIGGER escrows_never_fall ON escrows")


def _guard(*, sqlite: bool) -> None:
    falls = " OR ".join(f"NEW.{name} < OLD.{name}" for name in NEVER_FALL)
    if sqlite:
        op.execute(
            f"CREATE TRIGGER escrows_never_fall BEFORE UPDATE ON escrows WHEN {falls}"
            " BEGIN SELECT RAISE(ABORT, 'what an escrow has counted never falls'); END"
        )
        return
    op.execute(
        "CREATE OR REPLACE FUNCTION x402mw_never_fall() RETURNS trigger LANGUAGE plpgsql AS $$"
        f" BEGIN IF {falls} THEN"
        " RAISE EXCEPTION 'what an escrow has counted never falls'; END IF; RETURN NEW; END $$"
    )
    op.execute(
        "CREATE TRIGGER escrows_never_fall BEFORE UPDATE ON escrows"
        " FOR EACH ROW EXECUTE FUNCTION x402mw_never_fall()"
    )


def _create_agreements() -> None:
    op.create_table(
        "agreements",
        *(_text("escrow_id"), _text("carry"), _text("condition")),
        _number("review_seconds", nullable=True),
        sa.PrimaryKeyConstraint("escrow_id"),
        sa.ForeignKeyConstraint(["escrow_id"], ["escrows.escrow_id"]),
    )
    op.create_table(
        "parts",
        *map(_text, ("escrow_id", "name", "state", "proof")),
        *map(_number, ("number", "amount")),
        _number("review_until", nullable=True),
        sa.PrimaryKeyConstraint("escrow_id", "number"),
        sa.ForeignKeyConstraint(["escrow_id"], ["agreements.escrow_id"]),
        *_amounts("number", "amount"),
    )


def _create_disputes() -> None:
    op.create_table(
        "disputes",
        *map(_text, ("escrow_id", "status", "opener", "reason")),
        _text("arbiter", nullable=True),
        *map(_number, ("number", "amount", "opened_at", "deadline")),
        *map(_number, ("to_provider", "to_buyer")),
        _number("part", nullable=True),
        _number("decided_at", nullable=True),
        sa.PrimaryKeyConstraint("escrow_id", "number"),
        sa.ForeignKeyConstraint(["escrow_id"], ["agreements.escrow_id"]),
        sa.CheckConstraint("to_provider + to_buyer <= amount"),
        *_amounts("number", "amount", "to_provider", "to_buyer"),
    )
    open_ones = sa.text("status = 'open'")
    op.create_index(
        "disputes_open",
        "disputes",
        ["opened_at", "escrow_id"],
        sqlite_where=open_ones,
        postgresql_where=open_ones,
    )
    op.create_table(
        "evidence",
        *map(_text, ("escrow_id", "agent_id", "content")),
        *map(_number, ("number", "line", "created_at")),
        sa.PrimaryKeyConstraint("escrow_id", "number", "line"),
        sa.ForeignKeyConstraint(["escrow_id", "number"], ["disputes.escrow_id", "disputes.number"]),
    )


def downgrade() -> None:
    """Refuses: books are not taken back."""
    raise NotImplementedError

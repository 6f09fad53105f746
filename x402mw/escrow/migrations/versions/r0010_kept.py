"""What parties said and what money rests on is append-only too; disputes name their entry.

By that number open disputes are listed: entries become visible in its order, so whoever pages
through them skips none.
"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

APPEND_ONLY = {
    "evidence": ("escrow_id", "number", "line"),
    "transfers": ("transfer_id",),
    "bookings": ("reference",),
    "faucet_claims": ("agent_id",),
}
"""The tables, and the keys of their rows."""


def upgrade() -> None:
    """Adds triggers and a column, which leaves rows as they are."""
    sqlite = op.get_bind().dialect.name == "sqlite"
    for table, key in APPEND_ONLY.items():
        if sqlite:
            _guard_sqlite(table, key)
        else:
            op.execute(
                f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table}"
                " FOR EACH STATEMENT EXECUTE FUNCTION x402mw_append_only()"
            )
    # Disputes of before are listed first.
    op.execute("ALTER TABLE disputes ADD COLUMN entry BIGINT DEFAULT 0 NOT NULL")
    op.drop_index("disputes_open", "disputes")
    is_open = sa.text("status = 'open'")
    op.create_index(
        "disputes_open",
        "disputes",
        ["entry", "escrow_id"],
        sqlite_where=is_open,
        postgresql_where=is_open,
    )


def _guard_sqlite(table: str, key: tuple[str, ...]) -> None:
    refuse = "BEGIN SELECT RAISE(ABORT, 'the books are append-only'); END"
    for change in ("UPDATE", "DELETE"):
        name = f"{table}_no_{change.lower()}"
        op.execute(f"CREATE TRIGGER {name} BEFORE {change} ON {table} {refuse}")
    # INSERT OR REPLACE deletes without asking the DELETE trigger, so it is stopped before.
    same = " AND ".join(f"{column} = NEW.{column}" for column in key)
    taken = f"EXISTS (SELECT 1 FROM {table} WHERE {same})"  # noqa: S608 (own names)
    name = f"{table}_no_replace BEFORE INSERT ON {table}"
    op.execute(f"CREATE TRIGGER {name} WHEN {taken} {refuse}")


def downgrade() -> None:
    """Refuses: books are not taken back."""
    raise NotImplementedError

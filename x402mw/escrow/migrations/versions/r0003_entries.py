"""Entries keep one index, their number: two by random values were most of what a batch wrote.

By hash and by escrow nobody looks for entries, and that two entries never share a hash follows from
their numbers, which are part of it. Where such values are spread over an index, every entry
rewrites a page of its own.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

AMOUNT_MAX = 2**63 - 1
ENTRY = "seq, kind, escrow_id, asset, created_at, effective_at, previous_hash, hash"
POSTING = "seq, line, source, target, amount"


def upgrade() -> None:
    """Drops both indexes; SQLite has to write the tables anew for it, in one transaction."""
    op.drop_index("entries_escrow", "entries")
    if op.get_bind().dialect.name == "sqlite":
        _rewrite_books()
        _guard_books()
    else:
        op.drop_constraint("entries_hash_key", "entries")


def _rewrite_books() -> None:
    # Postings go first, because they name entries; renaming changes what they name with it.
    _create_entries()
    op.execute(f"INSERT INTO new_entries ({ENTRY}) SELECT {ENTRY} FROM entries")  # noqa: S608 (own names)
    _create_postings()
    op.execute(f"INSERT INTO new_postings ({POSTING}) SELECT {POSTING} FROM postings")  # noqa: S608 (own names)
    for table in ("postings", "entries"):
        op.drop_table(table)
        op.rename_table(f"new_{table}", table)


def _create_entries() -> None:
    op.create_table(
        "new_entries",
        *(_number("seq"), _text("kind"), _text("escrow_id", nullable=True), _text("asset")),
        *(_number("created_at"), _number("effective_at"), _text("previous_hash"), _text("hash")),
        sa.PrimaryKeyConstraint("seq"),
    )


def _create_postings() -> None:
    op.create_table(
        "new_postings",
        *(_number("seq"), _number("line"), _text("source"), _text("target"), _number("amount")),
        sa.PrimaryKeyConstraint("seq", "line"),
        sa.ForeignKeyConstraint(["seq"], ["new_entries.seq"]),
        sa.ForeignKeyConstraint(["source"], ["accounts.account"]),
        sa.ForeignKeyConstraint(["target"], ["accounts.account"]),
        sa.CheckConstraint("source <> target"),
        sa.CheckConstraint(f"amount BETWEEN 1 AND {AMOUNT_MAX} AND typeof(amount) = 'integer'"),
    )


def _text(name: str, *, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.Text, nullable=nullable)


def _number(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=False)


def _guard_books() -> None:
    """The triggers of the first revision; they went with the tables."""
    for table in ("entries", "postings"):
        for change in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{change.lower()} BEFORE {change} ON {table}"
                f" BEGIN SELECT RAISE(ABORT, 'the books are append-only'); END"
            )
        _guard_numbers(table, "seq" if table == "entries" else "seq, line")


def _guard_numbers(table: str, key: str) -> None:
    # INSERT OR REPLACE deletes without asking the DELETE trigger, so it is stopped before.
    taken = " AND ".join(f"{column} = NEW.{column}" for column in key.split(", "))
    when = f"EXISTS (SELECT 1 FROM {table} WHERE {taken})"  # noqa: S608 (own names)
    op.execute(
        f"CREATE TRIGGER {table}_no_replace BEFORE INSERT ON {table} WHEN {when}"
        " BEGIN SELECT RAISE(ABORT, 'the books are append-only'); END"
    )


def downgrade() -> None:
    """Refuses: books are not taken back."""
    raise NotImplementedError

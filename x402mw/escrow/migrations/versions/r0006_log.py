"""Entries say who caused them and why, and name the entry before them about the same escrow.

Old entries stay as they were written, because their hashes cover what they say: the history of an
older escrow is linked from its newest old entry on.
"""

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


def _add_low_balance() -> None:
    check = f"low_balance BETWEEN 0 AND {AMOUNT_MAX}"
    if op.get_bind().dialect.name == "sqlite":
        check += " AND typeof(low_balance) = 'integer'"
    op.execute(
        f"ALTER TABLE escrows ADD COLUMN low_balance BIGINT DEFAULT 0 NOT NULL CHECK ({check})"
    )


def _text(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.Text, nullable=True)


def _number(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=True)


def downgrade() -> None:
    """Refuses: books are not taken back."""
    raise NotImplementedError

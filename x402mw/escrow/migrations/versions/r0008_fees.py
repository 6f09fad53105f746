"""The operator books its fees out of the escrow like any other line of its bank: of no agent.

SQLite cannot change a check or a column of a table, so it writes the table anew.
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

AMOUNT_MAX = 2**63 - 1
KINDS = "kind IN ('deposit', 'withdrawal', 'fees')"
OF_AGENT = "(agent_id IS NULL) = (kind = 'fees')"


def upgrade() -> None:
    """Lets a booking be one of fees."""
    if op.get_bind().dialect.name != "sqlite":
        op.drop_constraint("bookings_kind_check", "bookings")
        op.alter_column("bookings", "agent_id", nullable=True)
        op.create_check_constraint(None, "bookings", KINDS)
        op.create_check_constraint(None, "bookings", OF_AGENT)
        return
    op.create_table(
        "new_bookings",
        *(sa.Column(name, sa.Text, nullable=False) for name in ("reference", "kind", "operator")),
        sa.Column("agent_id", sa.Text, nullable=True),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in ("amount", "created_at")),
        sa.PrimaryKeyConstraint("reference"),
        sa.ForeignKeyConstraint(["agent_id"], ["agents.agent_id"]),
        *map(sa.CheckConstraint, (KINDS, OF_AGENT)),
        sa.CheckConstraint(f"amount BETWEEN 1 AND {AMOUNT_MAX} AND typeof(amount) = 'integer'"),
    )
    columns = "reference, kind, agent_id, operator, amount, created_at"
    op.execute(f"INSERT INTO new_bookings ({columns}) SELECT {columns} FROM bookings")  # noqa: S608
    op.drop_table("bookings")
    op.rename_table("new_bookings", "bookings")


def downgrade() -> None:
    """Refuses: books are not taken back."""
    raise NotImplementedError

"""A webhook says how many deliveries wait for it, and when the first of them is due.

So whose turn it is is found without reading all that waits. Webhooks that a key made while it was
being replaced end, as they do with every other key that ends.
"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds two columns and their index, and orders what is due by its webhook."""
    op.add_column("webhooks", sa.Column("next_at", sa.BigInteger, nullable=True))
    op.execute("ALTER TABLE webhooks ADD COLUMN waiting BIGINT DEFAULT 0 NOT NULL")
    op.execute(
        "UPDATE webhooks SET next_at = line.first, waiting = line.waiting FROM (SELECT webhook_id,"
        " min(next_at) AS first, count(*) AS waiting FROM deliveries WHERE state = 'waiting'"
        " GROUP BY webhook_id) AS line WHERE line.webhook_id = webhooks.webhook_id"
    )
    op.execute(
        "DELETE FROM webhooks WHERE last_entry IS NULL AND key_id IN (SELECT key_id FROM api_keys"
        " WHERE revoked_at IS NOT NULL OR expires_at IS NOT NULL)"
    )
    due = sa.text("next_at IS NOT NULL")
    op.drop_index("deliveries_due", "deliveries")
    for name, table, columns in (
        ("deliveries_due", "deliveries", ["webhook_id", "next_at", "seq", "part"]),
        ("webhooks_due", "webhooks", ["next_at"]),
    ):
        op.create_index(name, table, columns, sqlite_where=due, postgresql_where=due)


def downgrade() -> None:
    """Refuses: books are not taken back."""
    raise NotImplementedError

"""A webhook ends with the key that made it, and with its agent.

Of the webhooks there are, nobody wrote down which key made them: they end with their agent only.
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds who made a webhook, and the last entry that it is told of."""
    op.add_column("webhooks", sa.Column("key_id", sa.Text, nullable=True))
    op.add_column("webhooks", sa.Column("last_entry", sa.BigInteger, nullable=True))
    op.create_index("webhooks_key", "webhooks", ["key_id"])


def downgrade() -> None:
    """Refuses: books are not taken back."""
    raise NotImplementedError

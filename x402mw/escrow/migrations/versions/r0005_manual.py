"""Manual escrows: what they hold beside a session's columns, and their timers."""

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Nothing yet."""


def downgrade() -> None:
    """Refuses: books are not taken back."""
    raise NotImplementedError

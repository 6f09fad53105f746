"""Entries say who caused them and why, and are signed now and then."""

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Nothing yet."""


def downgrade() -> None:
    """Refuses: books are not taken back."""
    raise NotImplementedError

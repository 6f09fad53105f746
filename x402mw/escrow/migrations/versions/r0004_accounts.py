"""Tenants, keys with scopes, handles, referrers and transfers."""

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Nothing yet."""


def downgrade() -> None:
    """Refuses: books are not taken back."""
    raise NotImplementedError

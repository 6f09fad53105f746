"""PostgreSQL: that postings name accounts that exist is asked once for each statement, not row.

A foreign key asks for every row and every key anew, which was a third of the cost of a batch.
Accounts are never renamed or deleted, so asking when postings are written is enough.
"""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Replaces two foreign keys by two triggers."""
    if op.get_bind().dialect.name != "postgresql":
        return
    for column in ("source", "target"):
        op.drop_constraint(f"postings_{column}_fkey", "postings")
    op.execute(
        "CREATE FUNCTION x402mw_accounts_exist() RETURNS trigger LANGUAGE plpgsql AS $$"
        " BEGIN IF EXISTS (SELECT FROM (SELECT source AS name FROM fresh UNION"
        " SELECT target FROM fresh) AS named LEFT JOIN accounts ON account = name"
        " WHERE account IS NULL) THEN"
        " RAISE EXCEPTION 'a posting names an account that does not exist'; END IF;"
        " RETURN NULL; END $$"
    )
    op.execute(
        "CREATE TRIGGER postings_accounts_exist AFTER INSERT ON postings"
        " REFERENCING NEW TABLE AS fresh"
        " FOR EACH STATEMENT EXECUTE FUNCTION x402mw_accounts_exist()"
    )
    op.execute(
        "CREATE FUNCTION x402mw_accounts_stay() RETURNS trigger LANGUAGE plpgsql AS $$"
        " BEGIN RAISE EXCEPTION 'accounts are neither renamed nor deleted'; END $$"
    )
    op.execute(
        "CREATE TRIGGER accounts_stay BEFORE UPDATE OF account OR DELETE OR TRUNCATE ON accounts"
        " FOR EACH STATEMENT EXECUTE FUNCTION x402mw_accounts_stay()"
    )


def downgrade() -> None:
    """Refuses: books are not taken back."""
    raise NotImplementedError

"""PostgreSQL: what postings name is asked once for each statement, not for each row.

A foreign key asks for every row and every key anew, which was a third of the cost of a batch.
Accounts and entries are never renamed or deleted, so asking when postings are written is enough.
That nothing falls is seen by the trigger's own condition, without calling a function.
"""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

NEVER_FALL = ("amount", "released", "redeemed", "refunded", "fee", "referral", "change")


def upgrade() -> None:
    """Replaces foreign keys and a slow trigger by quick ones."""
    if op.get_bind().dialect.name != "postgresql":
        return
    _keep_accounts()
    _check_postings()
    _check_falls()


def _check_postings() -> None:
    for column in ("seq", "source", "target"):
        op.drop_constraint(f"postings_{column}_fkey", "postings")
    op.execute(
        "CREATE FUNCTION x402mw_postings_stand() RETURNS trigger LANGUAGE plpgsql AS $$"
        " BEGIN IF EXISTS (SELECT FROM (SELECT source AS name FROM fresh UNION"
        " SELECT target FROM fresh) AS named LEFT JOIN accounts ON account = name"
        " WHERE account IS NULL) THEN"
        " RAISE EXCEPTION 'a posting names an account that does not exist'; END IF;"
        " IF EXISTS (SELECT FROM fresh LEFT JOIN entries ON entries.seq = fresh.seq"
        " WHERE entries.seq IS NULL) THEN"
        " RAISE EXCEPTION 'a posting belongs to no entry'; END IF;"
        " RETURN NULL; END $$"
    )
    op.execute(
        "CREATE TRIGGER postings_stand AFTER INSERT ON postings REFERENCING NEW TABLE AS fresh"
        " FOR EACH STATEMENT EXECUTE FUNCTION x402mw_postings_stand()"
    )


def _keep_accounts() -> None:
    op.execute(
        "CREATE FUNCTION x402mw_accounts_stay() RETURNS trigger LANGUAGE plpgsql AS $$"
        " BEGIN RAISE EXCEPTION 'accounts are neither renamed nor deleted'; END $$"
    )
    op.execute(
        "CREATE TRIGGER accounts_stay BEFORE UPDATE OF account OR DELETE OR TRUNCATE ON accounts"
        " FOR EACH STATEMENT EXECUTE FUNCTION x402mw_accounts_stay()"
    )


def _check_falls() -> None:
    op.execute("DROP TRIGGER escrows_never_fall ON escrows")
    op.execute(
        "CREATE OR REPLACE FUNCTION x402mw_never_fall() RETURNS trigger LANGUAGE plpgsql AS $$"
        " BEGIN RAISE EXCEPTION 'what an escrow has counted never falls'; END $$"
    )
    falls = " OR ".join(f"NEW.{name} < OLD.{name}" for name in NEVER_FALL)
    op.execute(
        f"CREATE TRIGGER escrows_never_fall BEFORE UPDATE ON escrows FOR EACH ROW WHEN ({falls})"
        " EXECUTE FUNCTION x402mw_never_fall()"
    )


def downgrade() -> None:
    """Refuses: books are not taken back."""
    raise NotImplementedError

"""Tenants, keys with scopes, handles, referrers, transfers, and accounts for test money.

An agent's only key so far becomes one of several in a table of their own, where it may all that it
might before. SQLite cannot change a check or drop a unique column, so it writes tables anew.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

AMOUNT_MAX = 2**63 - 1
TENANTS = (("public", "live"), ("public-test", "test"), ("operator", "live"))
OLD_SCOPES = "provide read spend"
WORLDS = "balance >= 0 OR account IN ('world', 'world:test')"


def upgrade() -> None:
    """Makes the new tables, moves what agents had, and lets test money in."""
    sqlite = op.get_bind().dialect.name == "sqlite"
    _create_tenants()
    if sqlite:
        _rewrite_agents()
        _rewrite_accounts()
    else:
        _extend_agents()
        op.drop_constraint("accounts_check", "accounts")
        op.create_check_constraint("accounts_check", "accounts", WORLDS)
    op.create_index("agents_handle", "agents", ["tenant", "handle"], unique=True)
    op.create_index("agents_tenant", "agents", ["tenant", "agent_id"])
    _open_test_accounts()
    _create_bookings()
    _create_transfers()
    _count_claims_by_mode()


def _text(name: str, *, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.Text, nullable=nullable)


def _number(name: str, *, nullable: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=nullable)


def _amount_check() -> sa.CheckConstraint:
    return _integer("amount", 1)


def _integer(name: str, least: int) -> sa.CheckConstraint:
    check = f"{name} BETWEEN {least} AND {AMOUNT_MAX}"
    if op.get_bind().dialect.name == "sqlite":
        check += f" AND typeof({name}) = 'integer'"
    return sa.CheckConstraint(check)


def _create_tenants() -> None:
    op.create_table(
        "tenants",
        *(_text("tenant"), _text("mode"), _number("created_at")),
        sa.PrimaryKeyConstraint("tenant"),
        sa.CheckConstraint("mode IN ('live', 'test')"),
    )
    for tenant, mode in TENANTS:
        op.execute(f"INSERT INTO tenants VALUES ('{tenant}', '{mode}', 0)")  # noqa: S608 (own names)


# Agents and their keys.


def _create_keys() -> None:
    op.create_table(
        "api_keys",
        *map(_text, ("key_id", "agent_id", "key_hash", "scopes", "name")),
        _number("created_at"),
        *(_number("expires_at", nullable=True), _number("revoked_at", nullable=True)),
        sa.PrimaryKeyConstraint("key_id"),
        sa.UniqueConstraint("key_hash"),
        sa.ForeignKeyConstraint(["agent_id"], ["agents.agent_id"]),
    )
    op.create_index("api_keys_agent", "api_keys", ["agent_id"])


def _move_keys(agents: str) -> None:
    # Half of a hash names it: nobody can guess a key from that, and nobody could before.
    op.execute(
        "INSERT INTO api_keys (key_id, agent_id, key_hash, scopes, name, created_at)"  # noqa: S608
        " SELECT 'key_' || substr(key_hash, 1, 32), agent_id, key_hash,"
        f" '{OLD_SCOPES}', '', created_at FROM {agents}"
    )


def _extend_agents() -> None:
    tenant = sa.Column("tenant", sa.Text, nullable=False, server_default="public")
    op.add_column("agents", tenant)
    op.alter_column("agents", "tenant", server_default=None)
    for name in ("handle", "referrer"):
        op.add_column("agents", _text(name, nullable=True))
    op.add_column("agents", _number("revoked_at", nullable=True))
    op.create_foreign_key(None, "agents", "tenants", ["tenant"], ["tenant"])
    _create_keys()
    _move_keys("agents")
    op.drop_column("agents", "key_hash")


def _rewrite_agents() -> None:
    # What names agents must find them again at the end of the transaction, not before.
    op.execute("PRAGMA defer_foreign_keys = ON")
    op.create_index("journals_agent", "journals", ["agent_id"])
    op.execute("CREATE TEMPORARY TABLE old_agents AS SELECT * FROM agents")
    op.execute("DELETE FROM agents")
    op.drop_table("agents")
    op.create_table(
        "agents",
        *(_text("agent_id"), _text("name"), _number("created_at"), _text("tenant")),
        *(_text("handle", nullable=True), _text("referrer", nullable=True)),
        _number("revoked_at", nullable=True),
        sa.PrimaryKeyConstraint("agent_id"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.tenant"]),
    )
    op.execute(
        "INSERT INTO agents (agent_id, name, created_at, tenant)"
        " SELECT agent_id, name, created_at, 'public' FROM old_agents"
    )
    op.drop_index("journals_agent", "journals")
    _create_keys()
    _move_keys("old_agents")
    op.execute("DROP TABLE old_agents")


# Accounts for test money.


def _rewrite_accounts() -> None:
    # Postings name accounts, so they go with them, as in the revision before.
    op.create_table(
        "new_accounts",
        *(_text("account"), _text("asset"), _number("balance")),
        sa.PrimaryKeyConstraint("account"),
        sa.CheckConstraint(WORLDS),
        _integer("balance", -AMOUNT_MAX),
    )
    op.execute("INSERT INTO new_accounts SELECT account, asset, balance FROM accounts")
    op.create_table(
        "new_postings",
        *(_number("seq"), _number("line"), _text("source"), _text("target"), _number("amount")),
        sa.PrimaryKeyConstraint("seq", "line"),
        sa.ForeignKeyConstraint(["seq"], ["entries.seq"]),
        sa.ForeignKeyConstraint(["source"], ["new_accounts.account"]),
        sa.ForeignKeyConstraint(["target"], ["new_accounts.account"]),
        sa.CheckConstraint("source <> target"),
        _amount_check(),
    )
    op.execute("INSERT INTO new_postings SELECT seq, line, source, target, amount FROM postings")
    for table in ("postings", "accounts"):
        op.drop_table(table)
        op.rename_table(f"new_{table}", table)
    _guard_postings()


def _guard_postings() -> None:
    """The triggers of the first revision; they went with the table."""
    for change in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER postings_no_{change.lower()} BEFORE {change} ON postings"
            " BEGIN SELECT RAISE(ABORT, 'the books are append-only'); END"
        )
    op.execute(
        "CREATE TRIGGER postings_no_replace BEFORE INSERT ON postings"
        " WHEN EXISTS (SELECT 1 FROM postings WHERE seq = NEW.seq AND line = NEW.line)"
        " BEGIN SELECT RAISE(ABORT, 'the books are append-only'); END"
    )


def _open_test_accounts() -> None:
    # A database without first rows gets these accounts with them.
    for account in ("world:test", "faucet:test", "house:fees:test"):
        op.execute(
            f"INSERT INTO accounts SELECT '{account}', asset || '\\:test', 0"  # noqa: S608 (own names)
            " FROM accounts WHERE account = 'world'"
        )


# What is new.


def _create_bookings() -> None:
    op.create_table(
        "bookings",
        *(_text("reference"), _text("kind"), _text("agent_id"), _text("operator")),
        *(_number("amount"), _number("created_at")),
        sa.PrimaryKeyConstraint("reference"),
        sa.ForeignKeyConstraint(["agent_id"], ["agents.agent_id"]),
        sa.CheckConstraint("kind IN ('deposit', 'withdrawal')"),
        _amount_check(),
    )


def _create_transfers() -> None:
    op.create_table(
        "transfers",
        *map(_text, ("transfer_id", "sender", "recipient", "asset", "memo")),
        *(_number("amount"), _number("number"), _number("created_at")),
        sa.PrimaryKeyConstraint("transfer_id"),
        sa.UniqueConstraint("number"),
        sa.ForeignKeyConstraint(["sender"], ["agents.agent_id"]),
        sa.ForeignKeyConstraint(["recipient"], ["agents.agent_id"]),
        sa.CheckConstraint("sender <> recipient"),
        _amount_check(),
    )
    for party in ("sender", "recipient"):
        op.create_index(f"transfers_{party}", "transfers", [party, "number"])


def _count_claims_by_mode() -> None:
    op.add_column(
        "faucet_claims", sa.Column("mode", sa.Text, nullable=False, server_default="live")
    )
    op.drop_index("faucet_day", "faucet_claims")
    op.create_index("faucet_day", "faucet_claims", ["mode", "day", "source"])


def downgrade() -> None:
    """Refuses: books are not taken back."""
    raise NotImplementedError

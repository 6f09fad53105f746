"""The operator's commands about accounts: `x402mw escrow tenant | agent | key`, and its bookings.

They work on the database beside the service, so who can read its files is the operator.
"""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from x402mw.cli_shared import DATABASE, Database
from x402mw.core.amounts import to_atomic

if TYPE_CHECKING:
    from x402mw.escrow.ledger import Ledger
    from x402mw.escrow.transactions import Transaction

Operation = Callable[["Transaction"], Awaitable[dict[str, Any]]]
Visit = Callable[[str, Callable[["Ledger"], Awaitable[dict[str, Any]]]], dict[str, Any]]
Mode = Literal["live", "test"]

AgentId = Annotated[str, typer.Argument(help="The agent's id, ag_...")]
Money = Annotated[str, typer.Argument(help='An amount, such as "25.00".')]
Reference = Annotated[
    str | None, typer.Option(help="The bank's name for this line; it is never booked twice.")
]
Scopes = Annotated[
    list[str],
    typer.Option("--scope", help="read, spend, provide, admin or arbiter; repeatable."),
]


def add_commands(escrow: typer.Typer, visit: Visit) -> None:
    """Adds the commands; `visit` opens the ledger of a database for one use."""

    def work(db: str, operation: Operation) -> dict[str, Any]:
        async def use(ledger: "Ledger") -> dict[str, Any]:
            async with ledger.write() as tx:
                return await operation(tx)

        return visit(db, use)

    _add_bookings(escrow, work)
    tenant, agent, key = (typer.Typer(no_args_is_help=True, help=text) for text in _GROUPS.values())
    for name, group in zip(_GROUPS, (tenant, agent, key), strict=True):
        escrow.add_typer(group, name=name)
    _add_tenants(tenant, work)
    _add_agents(agent, work)
    _add_keys(key, work)


_GROUPS = {
    "tenant": "Tenants: who runs agents here.",
    "agent": "Agents of any tenant.",
    "key": "Keys of any scope, for any agent.",
}
Work = Callable[[str, Operation], dict[str, Any]]


def _add_bookings(escrow: typer.Typer, work: Work) -> None:
    @escrow.command()
    def deposit(
        agent: AgentId, amount: Money, reference: Reference = None, db: Database = DATABASE
    ) -> None:
        """Book money that you received for an agent."""
        typer.echo(f"{agent} has {_book(work, db, 'deposit', agent, amount, reference)}")

    @escrow.command()
    def withdraw(
        agent: AgentId, amount: Money, reference: Reference = None, db: Database = DATABASE
    ) -> None:
        """Book money that you paid out to an agent."""
        typer.echo(f"{agent} has {_book(work, db, 'withdrawal', agent, amount, reference)}")

    @escrow.command("withdraw-fees")
    def withdraw_fees(
        amount: Money,
        reference: Annotated[
            str, typer.Option(help="The bank's name for this line; it is never booked twice.")
        ],
        db: Database = DATABASE,
    ) -> None:
        """Book fees that you paid out to yourself."""
        from x402mw.escrow import banking
        from x402mw.escrow.transactions import OPERATOR

        units = to_atomic(amount)
        answer = work(db, lambda tx: banking.book_fees(tx, OPERATOR, units, reference))
        typer.echo(f"fees left: {answer['balance']}")


def _book(work: Work, db: str, kind: str, agent: str, amount: str, reference: str | None) -> str:
    from x402mw.escrow import agents, banking
    from x402mw.escrow.transactions import OPERATOR

    units = to_atomic(amount)
    if reference is None:
        move = agents.deposit if kind == banking.DEPOSIT else agents.withdraw
        return str(work(db, lambda tx: move(tx, agent, units))["balance"])
    line: str = reference
    answer = work(db, lambda tx: banking.book(tx, OPERATOR, kind, agent, units, line))
    return str(answer["balance"])


def _add_tenants(group: typer.Typer, work: Work) -> None:
    @group.command("create")
    def create_tenant(
        name: Annotated[str, typer.Argument(help="3 to 40 of a-z, 0-9 and -.")],
        mode: Annotated[Mode, typer.Option(help="Test money never meets live money.")] = "live",
        db: Database = DATABASE,
    ) -> None:
        """Make a tenant."""
        from x402mw.escrow import tenants

        work(db, lambda tx: tenants.create(tx, name, mode))
        typer.echo(f"{name} is a {mode} tenant")


def _add_agents(group: typer.Typer, work: Work) -> None:
    @group.command("create")
    def create_agent(
        name: Annotated[str, typer.Argument(help="What to call it.")],
        tenant: Annotated[str, typer.Option(help='Whose it is, such as "operator".')],
        scope: Scopes,
        db: Database = DATABASE,
    ) -> None:
        """Make an agent of a tenant; prints its id and its key, which is shown this once."""
        from x402mw.escrow import agents

        scopes = frozenset(scope)
        made = work(db, lambda tx: agents.register(tx, name, tenant=tenant, scopes=scopes))
        typer.echo(f"X402MW_AGENT={made['agent_id']}")
        typer.echo(f"X402MW_API_KEY={made['api_key']}")

    @group.command("revoke")
    def revoke_agent(agent: AgentId, db: Database = DATABASE) -> None:
        """End an agent: its keys are dead at once, and nobody locks money for or from it."""
        from x402mw.escrow import sessions
        from x402mw.escrow.transactions import OPERATOR

        work(db, lambda tx: sessions.revoke_agent(tx, agent, OPERATOR))
        typer.echo(f"{agent} is revoked")


def _add_keys(group: typer.Typer, work: Work) -> None:
    @group.command("create")
    def create_key(agent: AgentId, scope: Scopes, db: Database = DATABASE) -> None:
        """Make a key for an agent, also for one that lost its own; it is shown this once."""
        from x402mw.escrow import access

        made = work(db, lambda tx: access.issue_as_operator(tx, agent, scope))
        typer.echo(f"X402MW_API_KEY={made['api_key']}")

"""What only an operator's command line makes: tenants, and agents with keys of any scope."""

from dataclasses import dataclass

from tests.escrow.market import Market
from tests.support.escrow import Agent
from x402mw.escrow import access, agents, tenants


async def make_tenant(m: Market, name: str, mode: str = "live") -> str:
    """A tenant of this name."""
    async with m.escrow.ledger.write() as tx:
        await tenants.create(tx, name, mode)
    return name


async def make_agent(m: Market, tenant: str, *scopes: str, handle: str | None = None) -> Agent:
    """An agent of a tenant, whose key has just these scopes."""
    async with m.escrow.ledger.write() as tx:
        made = await agents.register(
            tx, "made", tenant=tenant, handle=handle, scopes=frozenset(scopes or access.USUAL)
        )
    return Agent(made["agent_id"], made["api_key"])


async def make_key(m: Market, agent: Agent, *scopes: str) -> Agent:
    """One more key of an agent, with just these scopes."""
    async with m.escrow.ledger.write() as tx:
        made = await access.issue_as_operator(tx, agent.agent_id, scopes)
    return Agent(agent.agent_id, made["api_key"])


@dataclass
class Tenant:
    """A tenant with an admin, and one agent that has a handle, some money and something of each."""

    name: str
    admin: Agent
    member: Agent
    handle: str


async def furnish(m: Market, name: str, mode: str = "live") -> Tenant:
    """A tenant with an admin and a member that has 50.00."""
    await make_tenant(m, name, mode)
    admin = await make_agent(m, name, "admin")
    member = await make_agent(m, name, handle=f"{name}-bot")
    await m.escrow.deposit(member.agent_id, "50.00")
    return Tenant(name, admin, member, f"{name}-bot")

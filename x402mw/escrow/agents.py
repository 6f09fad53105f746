"""Agents, their books (journals), and how money enters: the faucet and the operator's deposits."""

import ipaddress
import secrets
from typing import Any

from sqlalchemy import Row, bindparam, func, literal, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.core import ids
from x402mw.core.amounts import AMOUNT_MAX, Atomic, display
from x402mw.escrow import access, deadlines, modes, referrals, schema
from x402mw.escrow.errors import Refused, not_found
from x402mw.escrow.rows import balance_of
from x402mw.escrow.rules.values import Transfer, agent_account
from x402mw.escrow.settings import DAY_SECONDS
from x402mw.escrow.tenants import find_mode
from x402mw.escrow.transactions import OPERATOR, Transaction


async def register(
    tx: Transaction,
    name: str,
    *,
    tenant: str = modes.PUBLIC[modes.LIVE],
    handle: str | None = None,
    referral_code: str | None = None,
    scopes: frozenset[str] = access.USUAL,
) -> dict[str, Any]:
    """Makes an agent with an empty account and a first key, whose secret is shown this once."""
    mode = await find_mode(tx.connection, tenant)
    if mode is None:
        raise Refused(404, "unknown_tenant", "there is no such tenant")
    await _check_handle(tx, tenant, handle)
    referrer = await _introducer(tx, referral_code, tenant, mode)
    agent_id = ids.format_id(ids.AGENT, secrets.token_bytes(ids.ID_BYTES))
    asset = modes.asset_of(tx.settings.asset.code, mode)
    await tx.open_account(agent_account(agent_id), asset)
    row = {"agent_id": agent_id, "name": name, "tenant": tenant, "handle": handle}
    await tx.insert(schema.agents, {**row, "referrer": referrer or None, "created_at": tx.now})
    key = await access.issue(tx, agent_id, mode, scopes)
    # Who registers alone, as most strangers do, enters nothing.
    if referrer or handle or tenant not in modes.PUBLIC.values():
        said = {"tenant": tenant, "referrer": referrer, "handle": handle}
        tx.note("agent_created", actor=agent_id, data=said)
    return {**row, "api_key": key["api_key"], "mode": mode, "balance": display(0)}


async def _check_handle(tx: Transaction, tenant: str, handle: str | None) -> None:
    if handle is not None and await referrals.find_by_handle(tx.connection, tenant, handle):
        raise Refused(409, "handle_taken", f"another agent of this tenant is called {handle}")


async def _introducer(tx: Transaction, code: str | None, tenant: str, mode: str) -> str:
    return await referrals.find(tx, code, tenant, mode) if code is not None else ""


# Who an agent is to others.

ALL = select(schema.agents, schema.tenants.c.mode).join(
    schema.tenants, schema.tenants.c.tenant == schema.agents.c.tenant
)
"""Agents with their modes."""

WITH_BALANCES = ALL.add_columns(schema.accounts.c.balance).join(
    schema.accounts, schema.accounts.c.account == literal("agent:").concat(schema.agents.c.agent_id)
)
"""And what they have."""

# Made once: to build a statement costs more than to run it.
_ONE = ALL.where(schema.agents.c.agent_id == bindparam("agent_id"))
_ITSELF = WITH_BALANCES.where(schema.agents.c.agent_id == bindparam("agent_id"))
_BOTH = ALL.where(schema.agents.c.agent_id.in_([bindparam("payer"), bindparam("payee")]))


async def find(connection: AsyncConnection, agent_id: str) -> Row[Any] | None:
    """The row of an agent with its mode, or None."""
    return (await connection.execute(_ONE, {"agent_id": agent_id})).one_or_none()


async def meet(tx: Transaction, payer: str, payee: str) -> str:
    """The asset in which one agent may pay another, or a refusal.

    An agent of the other mode does not exist here. Who is revoked neither pays nor is paid.
    """
    rows = await tx.connection.execute(_BOTH, {"payer": payer, "payee": payee})
    found = {row.agent_id: row for row in rows}
    one, other = found.get(payer), found.get(payee)
    if one is None or other is None or one.mode != other.mode:
        raise Refused(404, "unknown_agent", "there is no agent to_agent_id")
    if one.revoked_at is not None or other.revoked_at is not None:
        raise Refused(409, "agent_revoked", "this agent was revoked and trades no more")
    return modes.asset_of(tx.settings.asset.code, one.mode)


async def describe(connection: AsyncConnection, agent_id: str, now: int) -> dict[str, Any]:
    """An agent's own view of itself: what it has, and its keys without their secrets."""
    row = (await connection.execute(_ITSELF, {"agent_id": agent_id})).one()
    return {**summarize(row), "keys": await access.show_keys(connection, agent_id, now)}


def summarize(row: Row[Any]) -> dict[str, Any]:
    """An agent as it and its tenant see it."""
    return {
        "agent_id": row.agent_id,
        "name": row.name,
        "handle": row.handle,
        "tenant": row.tenant,
        "mode": row.mode,
        "balance": display(row.balance),
        "referrer": row.referrer,
        "created_at": row.created_at,
        "revoked_at": row.revoked_at,
    }


# Money from outside.


async def deposit(
    tx: Transaction,
    agent_id: str,
    amount: Atomic,
    *,
    actor: str = OPERATOR,
    data: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Books money that the operator received for an agent; `actor` is who says so."""
    if amount == 0:
        raise Refused(422, "invalid_request", "an amount of 0 moves nothing")
    asset = await asset_of(tx, agent_id)
    await _mint(tx, "deposit", agent_account(agent_id), amount, asset, actor=actor, data=data)
    return await _balance_after(tx, agent_id)


async def withdraw(
    tx: Transaction,
    agent_id: str,
    amount: Atomic,
    *,
    actor: str = OPERATOR,
    data: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Books money that the operator paid out to an agent; `actor` is who says so."""
    if amount == 0:
        raise Refused(422, "invalid_request", "an amount of 0 moves nothing")
    asset = await asset_of(tx, agent_id)
    # What an agent has does not depend on whether a sweeper has come by (I14).
    await deadlines.apply(tx, agent_id, at=deadlines.last_alive(tx))
    await check_funds(tx, agent_id, amount)
    moves = [Transfer(agent_account(agent_id), modes.world(asset), amount)]
    tx.post("withdrawal", moves, asset, actor=actor, data=data)
    return await _balance_after(tx, agent_id)


async def asset_of(tx: Transaction, agent_id: str) -> str:
    """The asset that an agent's account holds, as the books name it."""
    row = await find(tx.connection, agent_id)
    if row is None:
        raise Refused(404, "unknown_agent", f"there is no agent {agent_id}")
    return modes.asset_of(tx.settings.asset.code, row.mode)


async def check_funds(tx: Transaction, agent_id: str, amount: Atomic) -> None:
    """Refuses what an agent cannot pay."""
    balance = await balance_of(tx.connection, agent_account(agent_id))
    if balance < amount:
        shown = display(balance)
        raise Refused(409, "insufficient_funds", "the balance does not suffice", balance=shown)


async def _balance_after(tx: Transaction, agent_id: str) -> dict[str, Any]:
    await tx.flush()
    balance = await balance_of(tx.connection, agent_account(agent_id))
    return {"agent_id": agent_id, "balance": display(balance)}


async def _mint(
    tx: Transaction,
    kind: str,
    target: str,
    amount: Atomic,
    asset: str,
    *,
    actor: str | None = None,
    data: dict[str, Any] | None = None,
) -> None:
    world = modes.world(asset)
    # Everything there is together stays below 2^63, so no single balance can ever overflow.
    if amount - await balance_of(tx.connection, world) > AMOUNT_MAX:
        raise Refused(409, "amount_out_of_range", "the books cannot hold so much money")
    tx.post(kind, [Transfer(world, target, amount)], asset, actor=actor, data=data)


async def claim_faucet(tx: Transaction, agent_id: str, source: str) -> dict[str, Any]:
    """Gives a new agent its first money, once, within the limits per source and day."""
    # An agent whom the operator gave a key after its end collects what it has, and no more.
    day, asset = tx.now // DAY_SECONDS, await meet(tx, agent_id, agent_id)
    mode, faucet = modes.mode_of(asset), modes.faucet(asset)
    terms = tx.settings.terms(mode)
    await _check_claim(tx, agent_id, source, day, mode)
    if await balance_of(tx.connection, faucet) < terms.faucet_amount:
        funding = max(terms.faucet_amount, terms.faucet_daily)
        await _mint(tx, "faucet_funding", faucet, funding, asset)
    account = agent_account(agent_id)
    tx.post("faucet", [Transfer(faucet, account, terms.faucet_amount)], asset)
    answer = await _balance_after(tx, agent_id)
    claim = {"agent_id": agent_id, "source": source, "mode": mode, "day": day}
    await tx.insert(schema.faucet_claims, {**claim, "amount": terms.faucet_amount})
    return {"claimed": display(terms.faucet_amount), "balance": answer["balance"]}


async def _check_claim(tx: Transaction, agent_id: str, source: str, day: int, mode: str) -> None:
    claims = schema.faucet_claims.c
    mine = select(claims.agent_id).where(claims.agent_id == agent_id)
    if (await tx.connection.execute(mine)).first() is not None:
        raise Refused(409, "faucet_claimed", "this agent has had its first money")
    of_day = (claims.mode == mode) & (claims.day == day)
    given = select(func.coalesce(func.sum(claims.amount), 0)).where(of_day)
    today = int((await tx.connection.execute(given)).scalar_one())
    terms = tx.settings.terms(mode)
    if terms.faucet_amount == 0:
        raise Refused(409, "no_faucet", "there is no faucet here")
    if today + terms.faucet_amount > terms.faucet_daily:
        raise _faucet_limit(tx, "the faucet is empty for today")
    here = select(func.count()).where(of_day, claims.source == source)
    count = (await tx.connection.execute(here)).scalar_one()
    if source and count >= tx.settings.faucet_claims_per_source:
        raise _faucet_limit(tx, "too many claims from your address today")


def _faucet_limit(tx: Transaction, detail: str) -> Refused:
    rest = DAY_SECONDS - tx.now % DAY_SECONDS
    return Refused(429, "faucet_limit", detail, retry_after_seconds=rest)


def claim_source(host: str | None) -> str:
    """The address a claim is counted under; empty for loopback, which is exempt.

    One subscriber has a whole IPv6 /64, so that is what counts.
    """
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return "unknown"
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    if address.is_loopback:
        return ""
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


# Journals.


async def register_journal(
    tx: Transaction, agent_id: str, journal: str, receipt_key: str
) -> dict[str, Any]:
    """Registers a provider's book; repeating it is harmless, changing it is refused."""
    row = await find_journal(tx.connection, journal)
    if row is None:
        await tx.insert(
            schema.journals,
            {
                "journal": journal,
                "agent_id": agent_id,
                "receipt_key": receipt_key,
                "serial": 0,
                "created_at": tx.now,
            },
        )
    elif (row.agent_id, row.receipt_key) != (agent_id, receipt_key):
        raise Refused(409, "journal_taken", "this journal has another owner or receipt key")
    return {"journal": journal, "agent_id": agent_id, "receipt_key": receipt_key}


async def find_journal(connection: AsyncConnection, journal: str) -> Any:
    """The row of a journal, or None."""
    query = select(schema.journals).where(schema.journals.c.journal == journal)
    return (await connection.execute(query)).one_or_none()


async def note_serial(tx: Transaction, agent_id: str, journal: str, serial: int) -> int:
    """Keeps the highest write serial a journal has shown; returns the highest before this one.

    A journal that shows a lower one than before is a restored backup, and learns it here.
    """
    row = await find_journal(tx.connection, journal)
    if row is None or row.agent_id != agent_id:
        raise not_found()
    if serial > row.serial:
        journals = schema.journals
        await tx.connection.execute(
            update(journals).where(journals.c.journal == journal).values(serial=serial)
        )
    return int(row.serial)

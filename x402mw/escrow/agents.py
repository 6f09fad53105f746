"""Agents, their books (journals), and how money enters: the faucet and the operator's deposits."""

import hashlib
import ipaddress
import secrets
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.core import ids
from x402mw.core.amounts import AMOUNT_MAX, Atomic, display
from x402mw.escrow import schema
from x402mw.escrow.errors import Refused, not_found
from x402mw.escrow.rows import balance_of
from x402mw.escrow.rules.values import FAUCET, WORLD, Transfer, agent_account
from x402mw.escrow.transactions import OPERATOR, Transaction

API_KEY_PREFIX = "pf_live_"
API_KEY_BYTES = 32
DAY_SECONDS = 24 * 60 * 60


def hash_api_key(api_key: str) -> str:
    """What is stored of an API key: with 256 random bits in it, a plain hash is enough."""
    return hashlib.sha256(api_key.encode()).hexdigest()


async def register(tx: Transaction, name: str) -> dict[str, Any]:
    """Makes an agent with an empty account; its API key is shown this once."""
    agent_id = ids.format_id(ids.AGENT, secrets.token_bytes(ids.ID_BYTES))
    api_key = API_KEY_PREFIX + secrets.token_urlsafe(API_KEY_BYTES)
    await tx.open_account(agent_account(agent_id))
    await tx.insert(
        schema.agents,
        {
            "agent_id": agent_id,
            "name": name,
            "key_hash": hash_api_key(api_key),
            "created_at": tx.now,
        },
    )
    return {"agent_id": agent_id, "api_key": api_key, "name": name, "balance": display(0)}


async def find_by_key(connection: AsyncConnection, api_key: str) -> str | None:
    """The id of the agent with this API key."""
    agents = schema.agents.c
    query = select(agents.agent_id).where(agents.key_hash == hash_api_key(api_key))
    return (await connection.execute(query)).scalar_one_or_none()


async def exists(tx: Transaction, agent_id: str) -> bool:
    """Tells whether there is an agent with this id."""
    query = select(schema.agents.c.agent_id).where(schema.agents.c.agent_id == agent_id)
    return (await tx.connection.execute(query)).first() is not None


async def describe(connection: AsyncConnection, agent_id: str) -> dict[str, Any]:
    """An agent's own view of itself."""
    own = select(schema.agents).where(schema.agents.c.agent_id == agent_id)
    row = (await connection.execute(own)).one()
    balance = await balance_of(connection, agent_account(agent_id))
    return {
        "agent_id": agent_id,
        "name": row.name,
        "balance": display(balance),
        "created_at": row.created_at,
    }


# Money from outside.


async def deposit(tx: Transaction, agent_id: str, amount: Atomic) -> dict[str, Any]:
    """Books money that the operator received for an agent."""
    if amount == 0:
        raise Refused(422, "invalid_request", "an amount of 0 moves nothing")
    if not await exists(tx, agent_id):
        raise Refused(404, "unknown_agent", f"there is no agent {agent_id}")
    await _mint(tx, "deposit", agent_account(agent_id), amount, actor=OPERATOR)
    await tx.flush()
    return {
        "agent_id": agent_id,
        "balance": display(await balance_of(tx.connection, agent_account(agent_id))),
    }


async def _mint(
    tx: Transaction, kind: str, target: str, amount: Atomic, *, actor: str | None = None
) -> None:
    # Everything there is together stays below 2^63, so no single balance can ever overflow.
    if amount - await balance_of(tx.connection, WORLD) > AMOUNT_MAX:
        raise Refused(409, "amount_out_of_range", "the books cannot hold so much money")
    tx.post(kind, [Transfer(WORLD, target, amount)], tx.settings.asset.code, actor=actor)


async def claim_faucet(tx: Transaction, agent_id: str, source: str) -> dict[str, Any]:
    """Gives a new agent its first money, once, within the limits per source and day."""
    day, amount = tx.now // DAY_SECONDS, tx.settings.faucet_amount
    await _check_claim(tx, agent_id, source, day)
    if await balance_of(tx.connection, FAUCET) < amount:
        await _mint(tx, "faucet_funding", FAUCET, max(amount, tx.settings.faucet_daily))
    account = agent_account(agent_id)
    tx.post("faucet", [Transfer(FAUCET, account, amount)], tx.settings.asset.code)
    await tx.flush()
    await tx.insert(
        schema.faucet_claims,
        {"agent_id": agent_id, "source": source, "day": day, "amount": amount},
    )
    return {
        "claimed": display(amount),
        "balance": display(await balance_of(tx.connection, account)),
    }


async def _check_claim(tx: Transaction, agent_id: str, source: str, day: int) -> None:
    claims = schema.faucet_claims.c
    mine = select(claims.agent_id).where(claims.agent_id == agent_id)
    if (await tx.connection.execute(mine)).first() is not None:
        raise Refused(409, "faucet_claimed", "this agent has had its first money")
    given = select(func.coalesce(func.sum(claims.amount), 0)).where(claims.day == day)
    today = int((await tx.connection.execute(given)).scalar_one())
    amount = tx.settings.faucet_amount
    if amount == 0 or today + amount > tx.settings.faucet_daily:
        raise _faucet_limit(tx, "the faucet is empty for today")
    here = select(func.count()).where(claims.day == day, claims.source == source)
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

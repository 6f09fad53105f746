"""API keys: who asks, and what that key may do.

An agent has several keys, each with scopes. Only hashes are stored; a secret is shown once. A key
makes and ends only keys that may no more than itself, and one that only reads makes none.
"""

import hashlib
import secrets
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

from sqlalchemy import bindparam, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.core import ids
from x402mw.escrow import schema
from x402mw.escrow.errors import Refused, not_found
from x402mw.escrow.events.ends import end_of_key, hand_on
from x402mw.escrow.transactions import OPERATOR, Transaction

READ, SPEND, PROVIDE, ADMIN, ARBITER = "read", "spend", "provide", "admin", "arbiter"
SCOPES = (READ, SPEND, PROVIDE, ADMIN, ARBITER)
USUAL = frozenset({READ, SPEND, PROVIDE})
"""What the first key of a new agent may do."""

MANAGING = frozenset(SCOPES) - {READ}
"""A key with any of these also manages keys."""

KEY_ID = "key_"
KEYS_MAX = 20
API_KEY_BYTES = 32
_KEYS = schema.api_keys.c


class Principal(NamedTuple):
    """Who asks: an agent of a tenant, by one of its keys."""

    agent_id: str
    tenant: str
    mode: str
    scopes: frozenset[str]
    key_id: str


def hash_api_key(api_key: str) -> str:
    """What is stored of an API key: with 256 random bits in it, a plain hash is enough."""
    return hashlib.sha256(api_key.encode()).hexdigest()


@lru_cache(100)
def _read_scopes(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _works_at(now: Any) -> Any:
    return _KEYS.revoked_at.is_(None) & or_(_KEYS.expires_at.is_(None), _KEYS.expires_at > now)


# Made once: to build a statement costs more than to run it.
_BY_HASH = (
    select(
        *(_KEYS.agent_id, schema.agents.c.tenant, schema.tenants.c.mode),
        *(_KEYS.scopes, _KEYS.key_id),
    )
    .join(schema.agents, schema.agents.c.agent_id == _KEYS.agent_id)
    .join(schema.tenants, schema.tenants.c.tenant == schema.agents.c.tenant)
    .where(_KEYS.key_hash == bindparam("hash"), _works_at(bindparam("now")))
)


_WORKING = (
    select(schema.api_keys)
    .where(_KEYS.agent_id == bindparam("agent_id"), _works_at(bindparam("now")))
    .order_by(_KEYS.created_at.desc(), _KEYS.key_id)
)


_STILL = select(_KEYS.key_id).where(
    _KEYS.key_id == bindparam("key_id"), _works_at(bindparam("now"))
)


async def find_principal(connection: AsyncConnection, api_key: str, now: int) -> Principal | None:
    """Who has this API key, if it still works."""
    found = await connection.execute(_BY_HASH, {"hash": hash_api_key(api_key), "now": now})
    row = found.one_or_none()
    if row is None:
        return None
    return Principal(row.agent_id, row.tenant, row.mode, _read_scopes(row.scopes), row.key_id)


async def check_key(tx: Transaction, key_id: str) -> None:
    """Refuses a key that died since it let a request in: nothing is done after its end."""
    found = await tx.connection.execute(_STILL, {"key_id": key_id, "now": tx.now})
    if found.first() is None:
        raise unauthorized()


def describe(row: Any) -> dict[str, Any]:
    """A key without its secret."""
    return {
        "key_id": row.key_id,
        "name": row.name,
        "scopes": row.scopes.split(),
        "created_at": row.created_at,
        "expires_at": row.expires_at,
        "revoked_at": row.revoked_at,
    }


async def show_keys(connection: AsyncConnection, agent_id: str, now: int) -> list[dict[str, Any]]:
    """An agent's keys that work, newest first."""
    rows = await connection.execute(_WORKING, {"agent_id": agent_id, "now": now})
    return [describe(row) for row in rows]


# Making keys.


async def issue(
    tx: Transaction, agent_id: str, mode: str, scopes: Iterable[str], name: str = ""
) -> dict[str, Any]:
    """Makes a key, whoever asked for it; `api_key` is its secret."""
    api_key = f"pf_{mode}_" + secrets.token_urlsafe(API_KEY_BYTES)
    key_id = ids.format_id(KEY_ID, secrets.token_bytes(ids.ID_BYTES))
    wanted = set(scopes)
    if not wanted or not wanted <= set(SCOPES):
        raise Refused(422, "invalid_request", f"scopes are some of {', '.join(SCOPES)}")
    written = " ".join(sorted(wanted))
    await tx.insert(
        schema.api_keys,
        {
            "key_id": key_id,
            "agent_id": agent_id,
            "key_hash": hash_api_key(api_key),
            "scopes": written,
            "name": name,
            "created_at": tx.now,
        },
    )
    return {
        "key_id": key_id,
        "name": name,
        "scopes": written.split(),
        "created_at": tx.now,
        "api_key": api_key,
    }


async def issue_as_operator(
    tx: Transaction, agent_id: str, scopes: Iterable[str]
) -> dict[str, Any]:
    """Makes a key of any scopes for any agent, also for one that lost its own or was revoked."""
    query = select(schema.tenants.c.mode).join(
        schema.agents, schema.agents.c.tenant == schema.tenants.c.tenant
    )
    mode = (await tx.connection.execute(query.where(_is(agent_id)))).scalar_one_or_none()
    if mode is None:
        raise Refused(404, "unknown_agent", f"there is no agent {agent_id}")
    made = await issue(tx, agent_id, mode, scopes)
    data = {"agent_id": agent_id, "key_id": made["key_id"], "scopes": made["scopes"]}
    tx.note("key_created", actor=OPERATOR, data=data)
    return made


async def create_key(
    tx: Transaction, asker: Principal, name: str, scopes: Iterable[str] | None
) -> dict[str, Any]:
    """Makes one more key of the asking agent, that may no more than the key that asks."""
    await check_stays(tx, asker)
    wanted = asker.scopes if scopes is None else frozenset(scopes)
    _check_reach(asker, wanted)
    await _check_room(tx, asker)
    made = await issue(tx, asker.agent_id, asker.mode, wanted, name)
    _note(tx, "key_created", asker, made["key_id"], scopes=made["scopes"])
    return made


async def _check_room(tx: Transaction, asker: Principal) -> None:
    count = select(func.count()).where(_KEYS.agent_id == asker.agent_id, _works_at(tx.now))
    if (await tx.connection.execute(count)).scalar_one() >= KEYS_MAX:
        raise Refused(409, "too_many_keys", f"an agent has at most {KEYS_MAX} keys that work")


async def rotate_key(
    tx: Transaction, asker: Principal, key_id: str, grace_seconds: int
) -> dict[str, Any]:
    """Replaces a key by a new one like it; the old one dies now, or after some seconds of grace."""
    await check_stays(tx, asker)
    row = await _find_own(tx, asker, key_id)
    if row.revoked_at is not None or row.expires_at is not None:
        raise Refused(409, "key_ending", "this key was rotated or revoked already")
    if grace_seconds:
        await _check_room(tx, asker)
    made = await issue(tx, asker.agent_id, asker.mode, row.scopes.split(), row.name)
    ends = {"expires_at": tx.now + grace_seconds} if grace_seconds else {"revoked_at": tx.now}
    await _end(tx, _KEYS.key_id == key_id, ends)
    # Without grace the old key may have leaked: what it made goes with it.
    if grace_seconds:
        await hand_on(tx, key_id, made["key_id"])
    else:
        await end_of_key(tx, key_id)
    more = {"successor": made["key_id"], "grace_seconds": grace_seconds}
    _note(tx, "key_rotated", asker, key_id, **more)
    return {**made, "replaces": key_id, "replaced_until": tx.now + grace_seconds}


# Ending keys.


async def revoke_key(tx: Transaction, asker: Principal, key_id: str) -> dict[str, Any]:
    """Ends a key at once; again is harmless. The last key that manages keys can only be rotated."""
    await check_stays(tx, asker)
    row = await _find_own(tx, asker, key_id)
    if row.revoked_at is None:
        await _check_others(tx, asker.agent_id, key_id)
        await _end(tx, _KEYS.key_id == key_id, {"revoked_at": tx.now})
        await end_of_key(tx, key_id)
        _note(tx, "key_revoked", asker, key_id)
    return {**describe(row), "revoked_at": row.revoked_at or tx.now}


async def _check_others(tx: Transaction, agent_id: str, key_id: str) -> None:
    """Another key must stay that can make keys, or the agent's money is out of its reach."""
    query = select(_KEYS.scopes).where(
        _KEYS.agent_id == agent_id,
        _KEYS.key_id != key_id,
        _KEYS.revoked_at.is_(None),
        _KEYS.expires_at.is_(None),
    )
    others = (await tx.connection.execute(query)).scalars()
    if not any(_read_scopes(scopes) & MANAGING for scopes in others):
        raise Refused(409, "last_key", "no other key could make one; rotate it instead")


async def revoke_agent(tx: Transaction, agent_id: str, actor: str) -> dict[str, Any]:
    """Ends an agent: all its keys are dead at once, and nobody locks money for or from it again.

    What it has and what is locked stays; the operator can give it a key to collect that.
    """
    agents = schema.agents
    row = (await tx.connection.execute(select(agents).where(_is(agent_id)))).one_or_none()
    if row is None:
        raise not_found()
    if row.revoked_at is None:
        gone = update(agents).where(_is(agent_id)).values(revoked_at=tx.now)
        await tx.connection.execute(gone)
        live = (_KEYS.agent_id == agent_id) & _KEYS.revoked_at.is_(None)
        await _end(tx, live, {"revoked_at": tx.now})
        tx.note("agent_revoked", actor=actor, data={"agent_id": agent_id})
    return {"agent_id": agent_id, "revoked_at": row.revoked_at or tx.now}


def _is(agent_id: str) -> Any:
    return schema.agents.c.agent_id == agent_id


async def _end(tx: Transaction, which: Any, values: dict[str, int]) -> None:
    await tx.connection.execute(update(schema.api_keys).where(which).values(values))


# Who may do that. Read again inside the transaction: the asking key may have died meanwhile.


async def check_stays(tx: Transaction, asker: Principal) -> None:
    """Refuses a key that is being replaced: what it made or ended would outlive it."""
    query = select(_KEYS.revoked_at, _KEYS.expires_at).where(_KEYS.key_id == asker.key_id)
    row = (await tx.connection.execute(query)).one()
    if row.revoked_at is not None:
        raise unauthorized()
    if row.expires_at is not None:
        detail = "a key that is being replaced manages no keys and makes no webhooks"
        raise Refused(409, "key_ending", detail)


async def _find_own(tx: Transaction, asker: Principal, key_id: str) -> Any:
    query = select(schema.api_keys).where(_KEYS.key_id == key_id)
    row = (await tx.connection.execute(query)).one_or_none()
    if row is None or row.agent_id != asker.agent_id:
        raise not_found()
    _check_reach(asker, _read_scopes(row.scopes))
    return row


async def check_whole(tx: Transaction, asker: Principal) -> None:
    """Refuses a key that may less than another of its agent: it would end that one too."""
    await check_stays(tx, asker)
    rows = await tx.connection.execute(_WORKING, {"agent_id": asker.agent_id, "now": tx.now})
    _check_reach(asker, frozenset().union(*(_read_scopes(row.scopes) for row in rows)))


def _check_reach(asker: Principal, scopes: frozenset[str]) -> None:
    beyond = sorted(scopes - asker.scopes)
    if beyond:
        raise lacking_all(beyond)


def lacking(scopes: Iterable[str]) -> Refused:
    """The key works, but not for this; one of `scopes` would do."""
    words = list(scopes)
    detail = f"this key lacks the scope {' or '.join(words)}"
    return Refused(403, "scope", detail, scopes=words)


def lacking_all(scopes: Iterable[str]) -> Refused:
    """The key works, but not for this; it would take each of `scopes`."""
    words = list(scopes)
    if len(words) == 1:
        return lacking(words)
    detail = f"this key lacks the scopes {' and '.join(words)}, and all of them are needed"
    return Refused(403, "scope", detail, scopes=words)


def unauthorized() -> Refused:
    """No key, an unknown one, or a dead one."""
    return Refused(
        401,
        "unauthorized",
        "send Authorization: Bearer and your API key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _note(tx: Transaction, kind: str, asker: Principal, key_id: str, **more: Any) -> None:
    tx.note(kind, actor=asker.agent_id, data={"key_id": key_id, **more})

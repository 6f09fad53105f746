"""Webhooks as their owners manage them: made, listed, deleted, rotated, redelivered."""

import ipaddress
import re
import secrets
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import Row, case, delete, exists, func, insert, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.core import ids
from x402mw.escrow import schema, sessions
from x402mw.escrow.errors import Refused, not_found
from x402mw.escrow.events.derive import write_id
from x402mw.escrow.facts import hash_content
from x402mw.escrow.transactions import Transaction

WEBHOOK_ID = "wh_"
WEBHOOKS_MAX = 20
OLD_SECRET_SECONDS = 24 * 60 * 60
ACTIVE, FAILING, ENDED = "active", "failing", "ended"
WAITING, DELIVERED, DEAD = "waiting", "delivered", "dead"
HOST_CHARACTERS_MAX = 253
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)
_HOOKS, _SENT, _ONE = schema.webhooks, schema.deliveries, schema.deliverer


def check_url(url: str, *, local: bool) -> None:
    """Refuses what cannot be a target; its address is checked again when connecting."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _bad_url("this is no URL") from None
    if not parts.hostname or "@" in parts.netloc or parts.fragment or port == 0:
        raise _bad_url("a webhook's URL has a host, and no user or fragment")
    if not (url.isascii() and url.isprintable()) or " " in url:
        raise _bad_url("only ASCII without spaces: xn-- in the host, percent signs behind it")
    if not _is_host(parts.hostname) or ("[" in parts.netloc) != (":" in parts.hostname):
        raise _bad_url("there can be no host of this name")
    if parts.scheme != "https" and not (local and parts.scheme == "http"):
        raise _bad_url("a webhook's URL begins with https://")


def _is_host(name: str) -> bool:
    """Tells whether it is an address, or a name as the DNS has them."""
    if ":" in name:
        try:
            return "%" not in name and bool(ipaddress.ip_address(name))
        except ValueError:
            return False
    labels = name.removesuffix(".").split(".")
    return len(name) <= HOST_CHARACTERS_MAX and all(map(_LABEL.fullmatch, labels))


def _bad_url(detail: str) -> Refused:
    return Refused(422, "invalid_request", f"url: {detail}")


async def create(
    tx: Transaction,
    caller: str,
    url: str,
    events: tuple[str, ...] = (),
    escrow_id: str | None = None,
    *,
    key_id: str,
) -> dict[str, Any]:
    """Makes a webhook that is told what happens from now on; its secret is shown once.

    It ends with the key that makes it.
    """
    check_url(url, local=tx.settings.local_webhooks)
    if escrow_id is not None:
        await sessions.as_party(tx.connection, caller, escrow_id)
    mine = select(func.count()).where(_HOOKS.c.agent_id == caller, _HOOKS.c.last_entry.is_(None))
    if (await tx.connection.execute(mine)).scalar_one() >= WEBHOOKS_MAX:
        raise Refused(409, "too_many_webhooks", f"an agent has at most {WEBHOOKS_MAX} webhooks")
    webhook_id = ids.format_id(WEBHOOK_ID, secrets.token_bytes(ids.ID_BYTES))
    row = {
        "webhook_id": webhook_id,
        "agent_id": caller,
        "url": url,
        "events": " ".join(events),
        "escrow_id": escrow_id,
        "key_id": key_id,
        "status": ACTIVE,
        "generation": 1,
        "created_at": tx.now,
        "since": tx.service.entry_seq,
        "waiting": 0,
    }
    # While there is no webhook nobody reads the log for one.
    others = exists().where(_HOOKS.c.webhook_id.is_not(None))
    ahead = update(_ONE).where(_ONE.c.cursor < row["since"], ~others)
    await tx.connection.execute(ahead.values(cursor=row["since"]))
    await tx.connection.execute(insert(_HOOKS).values(row))
    said = {"webhook_id": webhook_id, "url_sha256": hash_content(url)}
    tx.note("webhook_created", data=said)
    secret = tx.signer.webhook_secret(webhook_id, 1)
    return {**describe(await _find(tx.connection, caller, webhook_id)), "secret": secret}


def describe(row: Row[Any]) -> dict[str, Any]:
    """A webhook as its owner sees it."""
    return {
        "webhook_id": row.webhook_id,
        "url": row.url,
        "events": row.events.split(),
        "escrow_id": row.escrow_id,
        "status": row.status if row.last_entry is None else ENDED,
        "key_id": row.key_id,
        "created_at": row.created_at,
    }


async def _find(connection: AsyncConnection, caller: str, webhook_id: str) -> Row[Any]:
    query = select(_HOOKS).where(_HOOKS.c.webhook_id == webhook_id, _HOOKS.c.agent_id == caller)
    row = (await connection.execute(query)).first()
    if row is None:
        raise not_found()
    return row


async def show_all(connection: AsyncConnection, caller: str) -> dict[str, Any]:
    """All webhooks of an agent, oldest first."""
    query = select(_HOOKS).where(_HOOKS.c.agent_id == caller)
    rows = await connection.execute(query.order_by(_HOOKS.c.created_at, _HOOKS.c.webhook_id))
    return {"items": [describe(row) for row in rows]}


async def remove(tx: Transaction, caller: str, webhook_id: str) -> dict[str, Any]:
    """Deletes a webhook, with all that it was not told yet."""
    row = await _find(tx.connection, caller, webhook_id)
    await tx.connection.execute(delete(_SENT).where(_SENT.c.webhook_id == webhook_id))
    await tx.connection.execute(delete(_HOOKS).where(_HOOKS.c.webhook_id == webhook_id))
    tx.note("webhook_deleted", data={"webhook_id": webhook_id})
    return describe(row)


async def rotate(tx: Transaction, caller: str, webhook_id: str) -> dict[str, Any]:
    """Makes the next secret; for a day deliveries are signed with both."""
    row = await _find(tx.connection, caller, webhook_id)
    generation, until = row.generation + 1, tx.now + OLD_SECRET_SECONDS
    changed = update(_HOOKS).where(_HOOKS.c.webhook_id == webhook_id)
    await tx.connection.execute(changed.values(generation=generation, old_until=until))
    tx.note("webhook_rotated", data={"webhook_id": webhook_id})
    secret = tx.signer.webhook_secret(webhook_id, generation)
    return {**describe(row), "secret": secret, "old_secret_until": until}


async def show_deliveries(
    connection: AsyncConnection,
    caller: str,
    webhook_id: str,
    *,
    limit: int,
    after: tuple[int, int] | None,
) -> dict[str, Any]:
    """A page of what a webhook was told, the newest event first, dead ones among them."""
    await _find(connection, caller, webhook_id)
    query = select(_SENT).where(_SENT.c.webhook_id == webhook_id)
    if after is not None:
        query = query.where(tuple_(_SENT.c.seq, _SENT.c.part) < after)
    query = query.order_by(_SENT.c.seq.desc(), _SENT.c.part.desc()).limit(limit + 1)
    found = (await connection.execute(query)).all()
    page = found[:limit]
    more = write_id(page[-1].seq, page[-1].part) if len(found) > limit else None
    return {"items": [_describe_delivery(row) for row in page], "next": more}


def _describe_delivery(row: Row[Any]) -> dict[str, Any]:
    return {
        "event_id": write_id(row.seq, row.part),
        "event": row.event,
        "escrow_id": row.escrow_id or None,
        "state": row.state,
        "attempts": row.attempts,
        "outcome": row.outcome,
        "created_at": row.created_at,
        "changed_at": row.changed_at,
        "next_at": row.next_at,
    }


async def redeliver(
    tx: Transaction, caller: str, webhook_id: str, seq: int, part: int
) -> dict[str, Any]:
    """Sends one event again as soon as possible, unless an earlier one of its escrow waits."""
    await _find(tx.connection, caller, webhook_id)
    this = (_SENT.c.webhook_id == webhook_id) & (_SENT.c.seq == seq) & (_SENT.c.part == part)
    row = (await tx.connection.execute(select(_SENT).where(this))).first()
    if row is None:
        raise not_found()
    if row.state == WAITING and row.next_at is None:
        detail = "an earlier event of the same escrow was not delivered yet"
        raise Refused(409, "waits_its_turn", detail)
    again = {"state": WAITING, "next_at": tx.now, "created_at": tx.now, "changed_at": tx.now}
    await tx.connection.execute(update(_SENT).where(this).values(again))
    hook = update(_HOOKS).where(_HOOKS.c.webhook_id == webhook_id)
    soon = case((_HOOKS.c.next_at < tx.now, _HOOKS.c.next_at), else_=tx.now)
    more = 0 if row.state == WAITING else 1
    await tx.connection.execute(hook.values(next_at=soon, waiting=_HOOKS.c.waiting + more))
    return _describe_delivery((await tx.connection.execute(select(_SENT).where(this))).one())

"""Reads the chain of a database, item by item, in one moment and with little memory."""

from collections.abc import AsyncIterator

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.core.errors import ConfigurationError
from x402mw.escrow import schema
from x402mw.escrow.audit.items import End, Item, Link, Opening, Point
from x402mw.escrow.books import GENESIS, Chained, entry_text, read_entries


async def count_entries(connection: AsyncConnection) -> int:
    """How many entries there are."""
    return int(
        (await connection.execute(select(func.count()).select_from(schema.entries))).scalar_one()
    )


async def read_chain(connection: AsyncConnection, since: int = 0) -> AsyncIterator[Item]:
    """The opening, every entry after `since` with the checkpoints among them, and the end."""
    service = (await connection.execute(select(schema.service))).one()
    yield await _opening(connection, service.network, service.root_key, since)
    points = await _points(connection, since)
    async for chained in read_entries(connection, since):
        while points and points[-1].seq < chained.entry.seq:
            yield points.pop()
        yield _link(chained)
    while points:
        yield points.pop()
    yield End(service.entry_seq, service.entry_hash)


async def _opening(connection: AsyncConnection, network: str, root_key: str, since: int) -> Opening:
    keys = schema.signing_keys.c
    found = await connection.execute(select(keys.proof).order_by(keys.number))
    entries = schema.entries.c
    hashes = await connection.execute(select(entries.hash).where(entries.seq == since))
    previous = hashes.scalar_one_or_none() if since else GENESIS
    if previous is None:
        raise ConfigurationError(f"there is no entry {since} in these books")
    proofs = tuple(proof for (proof,) in found if proof is not None)
    return Opening(network, root_key, proofs, since, previous)


async def _points(connection: AsyncConnection, since: int) -> list[Point]:
    """Checkpoints after an entry, newest first."""
    points = schema.checkpoints
    query = select(points).where(points.c.seq > since).order_by(points.c.seq.desc())
    return [
        Point(row.seq, row.hash, row.created_at, row.signature)
        for row in await connection.execute(query)
    ]


def _link(chained: Chained) -> Link:
    entry = chained.entry
    return Link(
        entry.seq, 1 if entry.plain else 2, entry_text(entry), chained.previous_hash, chained.hash
    )

"""A key that died: what came in by it is not done any more, however far it had come."""

import asyncio
import json
from itertools import chain
from typing import Any

import pytest
from sqlalchemy import func, select, update

from tests.escrow.market import Market, code_of, market
from tests.escrow.operators import make_agent
from tests.escrow.test_accounts_scopes import IDS, filled
from tests.escrow.test_openapi import DOCUMENT, WITH_BODY, members
from tests.support.escrow import Agent, reading
from x402mw.escrow import schema, web
from x402mw.escrow.access import SCOPES
from x402mw.escrow.api import page
from x402mw.escrow.api.routes import Route
from x402mw.escrow.app import ROUTES
from x402mw.escrow.bodies import Body, Close
from x402mw.escrow.transactions import OPERATOR

pytestmark = pytest.mark.anyio

WITHOUT_BODY = [
    route
    for route in ROUTES
    if route.body is None and (route.method != "GET" or "/c" in route.path)
]
"""Those that write all the same: `GET /changes` keeps the journal's serial."""


def body_of(route: Route) -> Any:
    """A body that the route reads."""
    model = next(iter(members(route.body)), None) if route.body is not None else None
    if model in (None, Body, Close):
        return {}
    return page.example(DOCUMENT, {"$ref": f"#/components/schemas/{model.__name__}"})


async def revoke(m: Market, agent: Agent, revoked_at: int | None = 1) -> None:
    """Ends all keys of an agent, as another process would; None takes it back.

    It enters nothing, so with it the books would not prove right.
    """
    keys = schema.api_keys
    dead = update(keys).where(keys.c.agent_id == agent.agent_id).values(revoked_at=revoked_at)
    async with m.escrow.ledger._engine.begin() as connection:
        await connection.execute(dead)


async def stored(m: Market) -> tuple[int, int]:
    """How many answers are kept, and entries made."""
    tables = (schema.idempotency, schema.entries)
    async with reading(m.escrow.ledger) as connection:
        counts = [
            (await connection.execute(select(func.count()).select_from(table))).scalar_one()
            for table in tables
        ]
    return counts[0], counts[1]


async def test_what_waits_for_the_writer_dies_with_its_key(db: str) -> None:
    """Keys: revoking takes effect at once, also for what had come in and waits for its turn."""
    async with market(db) as m:
        agent = await make_agent(m, OPERATOR, *SCOPES)
        before, waiting = await stored(m), []
        writer = m.escrow.ledger._writer
        async with writer:
            for number, route in enumerate(chain(WITH_BODY, WITHOUT_BODY)):
                path = filled(route.path, {**IDS, "event_id": "1", "webhook_id": "wh_" + "0" * 32})
                query = {"journal": IDS["journal"]} if route.method == "GET" else {}
                request = m.http.request(
                    *(route.method, path),
                    json=body_of(route),
                    params=query,
                    headers={**agent.headers, "Idempotency-Key": str(number)},
                )
                waiting.append(asyncio.create_task(request))
                # What comes no further was refused at the door.
                while len(writer._waiters or ()) <= number:
                    if waiting[-1].done():
                        break
                    await asyncio.sleep(0.001)
                assert not waiting[-1].done(), (route.path, waiting[-1].result().text)
            await revoke(m, agent)
        for task in waiting:
            assert code_of(await task) == (401, "unauthorized"), (await task).request.url
        assert await stored(m) == before
        await revoke(m, agent, None)


async def begin(
    m: Market, path: str, part: bytes, length: int
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Sends the head of a POST of the buyer, and the first part of its body."""
    host, port = m.escrow.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = (
        f"POST /api/v1{path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {m.buyer.api_key}\r\nContent-Length: {length}\r\n\r\n"
    )
    writer.write(head.encode() + part)
    await writer.drain()
    return reader, writer


async def test_a_body_that_comes_after_the_keys_end(db: str) -> None:
    """Keys: a request that had begun before its key's end pays nobody after it."""
    async with market(db) as m:
        body = json.dumps({"to_agent_id": m.provider.agent_id, "amount": "50.00"}).encode()
        reader, writer = await begin(m, "/transfers", body[:1], len(body))
        await asyncio.sleep(0.2)
        await revoke(m, m.buyer)
        writer.write(body[1:])
        assert b" 401 " in await reader.readline()
        writer.close()
        assert await m.balance(m.provider) == "0.00"
        await revoke(m, m.buyer, None)


async def test_a_body_that_does_not_come(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits: who sends a body too slowly is told so, and the connection ends."""
    monkeypatch.setattr(web, "BODY_SECONDS_MAX", 0.2)

    async with market(db) as m:
        reader, writer = await begin(m, "/faucet/claim", b"{", 2)
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in answer.lower()
        assert b'"code":"body_timeout"' in answer
        writer.close()
        assert await m.balance(m.buyer) == "100.00"

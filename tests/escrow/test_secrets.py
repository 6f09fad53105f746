"""What the database holds of the secrets that an escrow gives out: nothing that can be read."""

import base64
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from tests.escrow.market import Market, client_of, market
from tests.escrow.operators import make_agent, make_tenant
from tests.support.escrow import ROOT_SEED, MovingClock, running_escrow
from x402mw.escrow import backup, database, schema
from x402mw.escrow.idempotency import KEPT_SECONDS

pytestmark = pytest.mark.anyio
HOOK = {"url": "https://example.com/x"}


async def read_all(url: str) -> str:
    """Every row of every table as text; of a file every byte as well."""
    async with database.visiting(url) as connection:
        rows = [
            repr(row)
            for table in schema.metadata.sorted_tables
            for row in await connection.execute(select(table))
        ]
    files = [] if url.startswith("postgresql") else Path(url).parent.glob(Path(url).name + "*")
    raw = [file.read_bytes().decode("latin-1") for file in files if file.suffix != ".rootkey"]
    return "\n".join([*rows, *raw])


async def make_secrets(m: Market) -> tuple[set[str], list[httpx.Response]]:
    """Asks for every kind of secret there is, each under an idempotency key."""
    boss = await make_agent(m, await make_tenant(m, "acme"), "admin")
    answers = [
        await m.post(None, "/agents", {"name": "new"}, key="k"),
        await m.post(boss, "/agents", {"name": "hired"}, key="k"),
        made := await m.post(m.buyer, "/agents/me/keys", {}, key="k"),
        await m.post(m.buyer, f"/agents/me/keys/{made.json()['key_id']}/rotate", {}, key="k"),
        hook := await m.post(m.buyer, "/webhooks", HOOK, key="k"),
        await m.post(m.buyer, f"/webhooks/{hook.json()['webhook_id']}/rotate", key="k"),
    ]
    assert all(answer.is_success for answer in answers), [answer.text for answer in answers]
    told: list[dict[str, Any]] = [answer.json() for answer in answers]
    found = {body.get("api_key") or body["secret"] for body in told}
    assert len(found) == len(answers)
    return found | {m.buyer.api_key, boss.api_key}, answers[-2:]


async def test_the_database_tells_no_secret(db: str) -> None:
    """Security: no column, and no byte of the file, has a key, a secret or the root seed."""
    async with market(db) as m:
        found, kept = await make_secrets(m)
        for answer in kept:
            path = answer.request.url.path.removeprefix("/api/v1")
            body = HOOK if path == "/webhooks" else {}
            again = await m.post(m.buyer, path, body, key="k")
            assert again.headers["idempotent-replayed"] == "true"
            assert (again.status_code, again.content) == (answer.status_code, answer.content)
        held = await read_all(db)
    held += await read_all(db)
    coded = base64.urlsafe_b64encode(ROOT_SEED).decode().rstrip("=")
    for secret in (*found, ROOT_SEED.hex(), coded, ROOT_SEED.decode("latin-1")):
        # Also without what it begins with.
        assert secret[-40:] not in held


async def test_a_restored_escrow_repeats_a_secret(db: str, empty_db: str, tmp_path: Path) -> None:
    """Rule 8: with the root key a copy gives the same answer to a retry, and then forgets it."""
    async with market(db) as m:
        clock, buyer = m.escrow.clock, m.buyer
        assert isinstance(clock, MovingClock)
        first = await m.post(buyer, "/webhooks", HOOK, key="k")
    copy = str(tmp_path / "copy.db")
    await backup.copy(db, copy)
    await backup.copy(copy, empty_db)
    headers = {**buyer.headers, "Idempotency-Key": "k"}
    async with running_escrow(empty_db, clock) as escrow, client_of(escrow.url) as http:
        again = await http.post("/webhooks", json=HOOK, headers=headers)
        assert (again.content, again.headers["idempotent-replayed"]) == (first.content, "true")
        clock.advance(KEPT_SECONDS)
        await escrow.pass_time(1000)
        another = await http.post("/webhooks", json=HOOK, headers=headers)
        assert another.json()["secret"] != first.json()["secret"]

"""What Schemathesis finds out about a running escrow from its OpenAPI document alone: nothing."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.escrow.market import SESSION_KEY, Market, market
from tests.escrow.operators import make_agent, make_key
from tests.support.escrow import Agent
from x402mw.core.amounts import to_atomic
from x402mw.escrow.access import SCOPES
from x402mw.escrow.api import service
from x402mw.escrow.transactions import OPERATOR

pytestmark = pytest.mark.anyio
LONG = bool(os.environ.get("X402MW_LONG"))
EXAMPLES = int(os.environ.get("X402MW_EXAMPLES", 100 if LONG else 5))
PHASES = "examples,coverage,fuzzing" if LONG else "examples,fuzzing"
LEFT_OUT = (
    # A stream, and what would end the agents that trade here.
    *("/events", "/agents/me/revoke", "/admin/agents/{agent_id}/revoke"),
    # Of another server than the rest, which Schemathesis does not see.
    *(route.path for route in service.ROUTES),
)

CONFIG = """\
[generation]
database = "none"

[checks.positive_data_acceptance]
# What fields may be together is more than a schema says.
expected-statuses = ["2xx", "401", "403", "404", "409", "413", "415", "422", "429"]

[checks.negative_data_rejection]
expected-statuses = ["400", "401", "403", "404", "405", "409", "413", "415", "422", "429"]
"""


async def document_for(m: Market) -> Any:
    """The document as served, but what is sent names agents, escrows and keys that there are."""
    document = (await m.http.get(f"{m.escrow.url}/openapi.json")).json()
    for path in LEFT_OUT:
        del document["paths"][path]
    body = {"to_agent_id": m.provider.agent_id, "amount": "50.00"}
    known = {
        "^ag_": [m.provider.agent_id],
        "^jr_": [m.journal],
        "^[A-Za-z0-9_-]{43}": [SESSION_KEY],
        "^esc_": [
            (await m.open("20.00"))["escrow_id"],
            (await m.post(m.buyer, "/escrow", body)).json()["escrow_id"],
        ],
    }
    models = document["components"]["schemas"]
    for methods in document["paths"].values():
        for operation in methods.values():
            asked = [operation["parameters"], operation.get("requestBody", {})]
            for name in names_below(asked, models):
                name_known(models[name], known)
            name_known(asked, known)
    return document


def names_below(value: Any, models: Any) -> set[str]:
    """The models that a part of the document speaks of."""
    found = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(value)))
    return found.union(*(names_below(models[name], models) for name in found))


def name_known(schema: Any, known: dict[str, list[str]]) -> None:
    """Puts values that exist in the place of patterns that would only match strange ones."""
    if isinstance(schema, list):
        for part in schema:
            name_known(part, known)
    elif isinstance(schema, dict):
        for beginning, values in known.items():
            if str(schema.get("pattern", "")).startswith(beginning):
                del schema["pattern"]
                schema["enum"] = values
                schema.pop("examples", None)
        for part in schema.values():
            name_known(part, known)


async def examine(m: Market, folder: Path, agent: Agent | None) -> None:
    """Runs Schemathesis with a key, or without, and fails with its report if it finds anything."""
    config, document = folder / "schemathesis.toml", folder / "openapi.json"
    config.write_text(CONFIG)
    document.write_text(json.dumps(await document_for(m)))
    key = [] if agent is None else ["--header", f"Authorization: Bearer {agent.api_key}"]
    done = await anyio.run_process(
        [
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run"),
            *("--origin", m.escrow.url, "--checks", "all", "--phases", PHASES),
            *("--warnings", "off", "--max-examples", str(EXAMPLES), "--suppress-health-check"),
            *("all", *key, str(document)),
        ],
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()


@pytest.mark.parametrize("who", ["buyer", *(("nobody", "provider", "operator") if LONG else ())])
async def test_nothing_contradicts_the_document(who: str, tmp_path: Path) -> None:
    """API quality: no 5xx, no undocumented status, type or body, whoever asks."""
    async with market(tmp_path, faucet_daily=to_atomic("1000")) as m:
        asking = {
            "nobody": None,
            "buyer": await make_key(m, m.buyer, *SCOPES),
            "provider": await make_key(m, m.provider, *SCOPES),
            "operator": await make_agent(m, OPERATOR, *SCOPES),
        }
        await examine(m, tmp_path, asking[who])

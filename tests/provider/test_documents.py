"""The code in the documents is run as it stands, by the provider that it would have."""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.provider import Desk, call
from x402mw.provider import PaymentMiddleware, Provider

pytestmark = pytest.mark.anyio

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"(?:<!-- test: (\w+) -->\n+)?```python\n(.*?)```", re.DOTALL)
KINDS = {"decorator", "logs", "metrics"}
ELSEWHERE = {"run": "escrow/test_client_docs.py", "receiver": "escrow/test_webhooks.py"}


def blocks() -> Iterator[tuple[str, str]]:
    """Every block of Python in the documents, and the kind that its comment says."""
    for path in sorted(DOCS.glob("*.md")):
        yield from BLOCK.findall(path.read_text())


def run(kind: str, desk: Desk, monkeypatch: Any) -> dict[str, Any]:
    """Runs the one block of a kind, with a provider that needs no escrow; returns its names."""

    def from_env(telemetry: Any = None) -> Desk:
        desk.telemetry = telemetry
        return desk

    monkeypatch.setattr(Provider, "from_env", from_env)
    (code,) = (code for found, code in blocks() if found == kind)
    names: dict[str, Any] = {"__name__": "document"}
    exec(compile(code, f"docs: {kind}", "exec"), names)
    return names


async def stop(app: Any) -> None:
    """Stops the provider, wherever it stands among an app's middleware."""
    layer = app.middleware_stack
    while not isinstance(layer, PaymentMiddleware):
        layer = layer.app
    await layer._stop()


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path / "journal.db")


def test_no_code_is_left_to_rot():
    """Each block of Python in the documents belongs to a test here, or to one elsewhere."""
    assert {kind for kind, _ in blocks()} == KINDS | ELSEWHERE.keys()


async def test_prices_beside_handlers(desk, monkeypatch):
    """What the provider's guide prices is sold, and what it calls free is free."""
    app = run("decorator", desk, monkeypatch)["app"]
    assert (await call(app, "GET", "/quote/BTC")).status == 402
    assert (await call(app, "POST", "/translate")).status == 402
    assert (await call(app, "GET", "/translate")).status == 200
    await stop(app)


async def test_a_page_for_prometheus(desk, monkeypatch):
    """The example shows what happened, on a path of its own that costs nothing."""
    app = run("metrics", desk, monkeypatch)["app"]
    assert (await call(app, "GET", "/quote/BTC")).status == 402
    answer = await call(app, "GET", "/metrics")
    assert answer.status == 200
    assert (answer.header("content-type") or "").startswith("text/plain")
    lines = answer.body.decode().splitlines()
    challenged = [one for one in lines if one.startswith("x402mw_provider_requests_total{")]
    assert len(challenged) == 1
    assert challenged[0].endswith(" 1.0")
    names = {one.partition("{")[0] for one in lines}
    assert {"x402mw_provider_unredeemed", "x402mw_provider_escrow_away"} <= names
    await stop(app)


def test_logs_as_json(desk, monkeypatch, capsys):
    """The example makes every record of ours a line of JSON."""
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.WARNING)
    run("logs", desk, monkeypatch)
    logging.getLogger("x402mw.provider").info("hello", extra={"event": "greeting"})
    assert json.loads(capsys.readouterr().err)["event"] == "greeting"

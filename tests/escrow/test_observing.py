"""What an escrow tells its operator: one record and one duration for each request."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.support.escrow import ROOT_SEED
from tests.support.figures import Broken, Figures
from x402mw.core.strict import b64url_encode
from x402mw.escrow import web
from x402mw.escrow.errors import Refused, not_found
from x402mw.escrow.observing import Observed

pytestmark = pytest.mark.anyio


async def fine(request: Request) -> Response:
    return Response("fine")


async def refusing(request: Request) -> Response:
    raise not_found()


async def limited(request: Request) -> Response:
    raise Refused(429, "faucet_limit", "too many")


async def failing(request: Request) -> Response:
    raise RuntimeError("disk on fire")


def client(telemetry: Any) -> httpx.AsyncClient:
    """A client of an app that observes, refuses and fails as the escrow's does."""
    routes = [
        Route("/fine/{secret}", fine),
        Route("/refusing", refusing),
        Route("/limited", limited),
        Route("/failing", failing),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers=web.EXCEPTION_HANDLERS,
        middleware=[Middleware(Observed, telemetry=telemetry)],
    )
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://escrow")


async def test_each_request_is_told_by_its_operation(caplog: pytest.LogCaptureFixture) -> None:
    """Operation, outcome and code are words of ours; paths and queries appear nowhere."""
    caplog.set_level(logging.DEBUG, "x402mw.escrow")
    figures = Figures()
    async with client(figures) as http:
        for path in ("/fine/hush?key=hush", "/refusing", "/limited", "/failing", "/hush"):
            await http.get(path)
    counts = {key[1:]: len(found) for key, found in figures.durations.items()}
    assert counts == {
        ("fine", "ok"): 1,
        ("refusing", "refused"): 1,
        ("limited", "refused"): 1,
        ("failing", "failed"): 1,
        ("-", "refused"): 1,
    }
    told = [vars(record) for record in caplog.records if record.name == "x402mw.escrow"]
    assert [(one["operation"], one["status"], one["reason"], one["levelname"]) for one in told] == [
        ("fine", 200, "", "DEBUG"),
        ("refusing", 404, "not_found", "INFO"),
        ("limited", 429, "faucet_limit", "INFO"),
        ("failing", 500, "", "ERROR"),
        ("-", 404, "", "INFO"),
    ]
    assert "hush" not in caplog.text


async def test_figures_that_fail_hurt_no_request(caplog: pytest.LogCaptureFixture) -> None:
    """A telemetry that raises is told once."""
    async with client(Broken()) as http:
        assert [(await http.get("/fine/x")).status_code for _ in range(2)] == [200, 200]
    assert [getattr(one, "event", "") for one in caplog.records] == ["telemetry_failed"]


def test_serve_writes_json_when_told_to(tmp_path: Path) -> None:
    """`--log-format json --log-level debug`: every line of stderr is a JSON object."""
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "x402mw.cli", "escrow", "serve", "--port", "0"),
                *("--db", str(tmp_path / "escrow.db")),
                *("--log-format", "json", "--log-level", "debug"),
            ],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "X402MW_ROOT_KEY": b64url_encode(ROOT_SEED)},
        )
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip().partition("=")[2]
            answer = httpx.post(f"{url}/api/v1/agents", json={"name": "hush"}, timeout=10).json()
            headers = {"Authorization": f"Bearer {answer['api_key']}"}
            httpx.get(f"{url}/api/v1/agents/me", headers=headers, timeout=10).raise_for_status()
            httpx.post(f"{url}/api/v1/faucet/claim", headers={"Authorization": "x"}, timeout=10)
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=30)
    written = (tmp_path / "log").read_text()
    lines = [json.loads(line) for line in written.splitlines()]
    operations = {
        (line["operation"], line["status"], line["reason"]): line["level"]
        for line in lines
        if line.get("event") == "operation"
    }
    assert operations == {
        ("register_agent", 201, ""): "debug",
        ("show_agent", 200, ""): "debug",
        ("claim_faucet", 401, "unauthorized"): "info",
    }
    for secret in (answer["api_key"], b64url_encode(ROOT_SEED), "hush"):
        assert secret not in written

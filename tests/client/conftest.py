"""Every test of the buyer runs through both transports, and never really sleeps for long."""

import pytest

from tests.client.world import World
from x402mw_client import flow


@pytest.fixture(params=["async", "sync"])
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> World:
    """A scripted market, with a wallet behind the async or the sync transport."""
    monkeypatch.setattr(flow, "RESEND_PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(flow, "PAUSE_MIN_SECONDS", 0.001)
    return World(request.param)

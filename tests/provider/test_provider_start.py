"""A provider of its own account at a real escrow: what a start needs, and what it refuses."""

import time

import pytest

from tests.support.asgi import call
from tests.support.escrow import running_escrow
from tests.support.provider import Handler
from x402mw.core.errors import ConfigurationError
from x402mw.provider import PaymentMiddleware, PerCall, Priced, Provider
from x402mw.provider.settings import read_settings

pytestmark = pytest.mark.anyio

PRICES = {"GET /quote/{symbol}": PerCall("0.001")}
NOWHERE = "http://127.0.0.1:9"


def app(provider: Provider, prices=PRICES) -> PaymentMiddleware:
    return PaymentMiddleware(Handler(), provider=provider, prices=prices)


async def test_only_the_first_start_needs_the_escrow(tmp_path):
    """A first start meets the escrow and registers; a later one serves with the escrow away."""
    journal = str(tmp_path / "journal.db")
    async with running_escrow(tmp_path, time.time) as escrow:
        agent = await escrow.new_agent()
        options = {"escrow": escrow.url, "api_key": agent.api_key, "journal": journal}
        first = app(Provider(**options, escrow_root=escrow.root_key))
        service = await first._ready({"type": "http"})
        assert service.book.pay_to == agent.agent_id
        other = app(Provider(**options))
        other_service = await other._ready({"type": "http"})
        assert other_service.book == service.book
        assert [service.journal.leads, other_service.journal.leads] == [True, False]
        await other._stop()
        await first._stop()
    second = app(Provider(**options))
    assert (await call(second, "GET", "/quote/BTC", host=b"localhost")).status == 402
    assert second._service is not None
    assert second._service.link.away
    await second._stop()


async def test_a_first_start_without_the_escrow_fails(tmp_path):
    """Without an escrow there is no account and no key: the first start fails, and says so."""
    journal = str(tmp_path / "journal.db")
    lost = app(Provider(escrow=NOWHERE, api_key="pf_live_x", journal=journal))
    with pytest.raises(ConfigurationError, match="first start"):
        await lost._ready({"type": "http"})
    assert lost._service is None


async def test_a_wrong_account_or_root_fails(tmp_path):
    """An unknown API key, another root key, and calls too long for the escrow stop the start."""
    async with running_escrow(tmp_path, time.time) as escrow:
        agent = await escrow.new_agent()
        good = {"escrow": escrow.url, "api_key": agent.api_key}
        wrong = {
            "refuses": ({**good, "api_key": "pf_live_" + "0" * 32}, PRICES),
            "root key": ({**good, "escrow_root": "A" * 42 + "E"}, PRICES),
            "claim window": (good, {"GET /q": Priced(PerCall("0.001"), timeout_seconds=3600)}),
        }
        for number, (message, (options, prices)) in enumerate(wrong.items()):
            journal = str(tmp_path / f"{number}.db")
            with pytest.raises(ConfigurationError, match=message):
                await app(Provider(**options, journal=journal), prices)._ready({"type": "http"})


@pytest.mark.parametrize(
    "options",
    [
        {"escrow_root": "nonsense"},
        {"unredeemed_max": "ten"},
        {"origins": ["api.example.com"]},
        {"origins": ["https://x.example", "http://x.example"]},
    ],
)
def test_settings_that_could_not_work(options):
    """A setting that could not work is refused when the provider is made."""
    with pytest.raises(ConfigurationError):
        Provider(escrow=NOWHERE, api_key="pf_live_x", **options)


def test_settings_come_from_the_environment():
    """The environment is read in one place, and what is missing is named."""
    with pytest.raises(ConfigurationError, match="X402MW_ESCROW and X402MW_API_KEY"):
        read_settings({"X402MW_API_KEY": " "})
    found = read_settings(
        {"X402MW_ESCROW": NOWHERE, "X402MW_API_KEY": "k", "X402MW_ORIGINS": "https://a, https://b"}
    )
    assert found["origins"] == ["https://a", "https://b"]
    assert found["journal"] == "x402mw-journal.db"
    assert found["escrow_root"] is None

"""No secret is ever in a record: every party runs for real, with every logger at DEBUG.

What httpx writes about requests of its own (URLs with their queries, headers of answers) is the
caller's to choose: queries and cookies that are set are looked for in our own records only.
"""

import base64
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio.to_thread
import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from tests.support.escrow import ROOT_SEED, RunningEscrow, running_escrow
from tests.support.serving import serving
from x402mw.core import headers
from x402mw.core.errors import EscrowRefused, LimitExceeded
from x402mw.core.messages import PaymentPayload
from x402mw.provider import PaymentMiddleware, PerCall, PerUnit, Provider
from x402mw.telemetry.logs import JsonFormatter
from x402mw_client import Limits, PaymentTransport, SyncPaymentTransport, Wallet
from x402mw_client.escrow import AsyncEscrowClient

pytestmark = [pytest.mark.anyio, pytest.mark.whole]

ASKED = {"Authorization": "Bearer hush-authorization", "Cookie": "session=hush-cookie"}
QUERY = {"key": "private-query"}
PRIVATE = ("private-query", "private-cookie")
"""What none of our own records tells."""


class Ear(logging.Handler):
    """Hears every record of every logger, and writes it in every way there is."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.written: list[str] = []
        self.ours: list[str] = []
        self.loggers: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = logging.Formatter("%(message)s").format(record)
        fields = repr(vars(record))
        self.written.append(f"{text}\n{fields}\n{JsonFormatter().format(record)}")
        room = record.name.partition(".")[0]
        self.loggers.add(room)
        if room == "x402mw":
            self.ours.append(self.written[-1])


@contextlib.contextmanager
def hearing_everything() -> Iterator[Ear]:
    """Sets all loggers there are to DEBUG, whatever they were told before."""
    ear, before = Ear(), logging.root.level
    found = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict)]
    levels = [(logger, logger.level) for logger in found]
    logging.root.addHandler(ear)
    logging.root.setLevel(logging.DEBUG)
    for logger in found:
        logger.setLevel(logging.DEBUG)
        if not logger.propagate:
            logger.addHandler(ear)
    try:
        yield ear
    finally:
        logging.root.removeHandler(ear)
        logging.root.setLevel(before)
        for logger, level in levels:
            logger.setLevel(level)
            logger.removeHandler(ear)


@dataclass
class Secrets:
    """All that must not be told, in the forms in which it might be."""

    found: set[str] = field(default_factory=lambda: {"hush-"})

    def add_bytes(self, raw: bytes) -> None:
        """A seed: as hex, in both alphabets of base64, and as Python writes it."""
        coded = (base64.b64encode(raw).decode(), base64.urlsafe_b64encode(raw).decode())
        self.found |= {raw.hex(), repr(raw)[2:-1], *(one.rstrip("=") for one in coded)}

    def add_header(self, value: str) -> None:
        """A payment header, with the token and the signed voucher in it."""
        payload = headers.decode_header(PaymentPayload, value.encode(), 4096).payload
        raw = base64.urlsafe_b64decode(payload.voucher + "=")
        self.found |= {value, payload.token, payload.voucher}
        self.add_bytes(raw[112:])

    def told_in(self, written: list[str]) -> list[str]:
        """The records that tell one."""
        return [text for text in written if any(secret in text for secret in self.found)]


def noting(secrets: Secrets) -> Any:
    """A hook for both transports that keeps each payment header that is sent."""

    class Inner(httpx.AsyncHTTPTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            note(request)
            return await super().handle_async_request(request)

    class SyncInner(httpx.HTTPTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            note(request)
            return super().handle_request(request)

    def note(request: httpx.Request) -> None:
        value = request.headers.get(headers.PAYMENT_SIGNATURE)
        if value is not None:
            secrets.add_header(value)

    return Inner, SyncInner


def shop(provider: Provider) -> Starlette:
    """A shop that sells in every way, and fails too."""

    async def item(request: Request) -> PlainTextResponse:
        answer = PlainTextResponse("item")
        answer.set_cookie("given", "private-cookie")
        return answer

    async def stream(request: Request) -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            for _ in range(3):
                request.state.payment.charge(rows=1)
                yield "row\n"

        return StreamingResponse(parts())

    async def broken(request: Request) -> PlainTextResponse:
        raise RuntimeError("broken on purpose")

    app = Starlette(
        routes=[Route("/item", item), Route("/stream", stream), Route("/broken", broken)]
    )
    prices = {
        "GET /item": PerCall("0.001"),
        "GET /stream": PerUnit("row", "0.001", max_units=10),
        "GET /broken": PerCall("0.001"),
    }
    app.add_middleware(PaymentMiddleware, provider=provider, prices=prices)
    return app


@asynccontextmanager
async def market(tmp_path: Path, secrets: Secrets) -> AsyncIterator[tuple[RunningEscrow, Any, str]]:
    """An escrow, a buyer's account, and a shop on a socket."""
    async with running_escrow(tmp_path, time.time) as escrow:
        seller = await escrow.new_agent("seller")
        buyer = await escrow.new_agent("buyer", balance="20.00")
        secrets.found |= {seller.api_key, buyer.api_key, seller.api_key[-20:]}
        provider = Provider(
            escrow=escrow.url,
            api_key=seller.api_key,
            journal=str(tmp_path / "journal.db"),
            redeem_seconds=1,
        )
        app = shop(provider)
        async with serving(app) as url:
            layer: Any = app.middleware_stack
            while not isinstance(layer, PaymentMiddleware):
                layer = layer.app
            assert layer._service is not None
            secrets.add_bytes(layer._service.journal.receipt_seed)
            yield escrow, buyer, url


def keep_session_secrets(secrets: Secrets, wallet: Wallet) -> None:
    """Notes the keys and tokens of a wallet's sessions."""
    for session in wallet.state.purse.sessions.values():
        secrets.add_bytes(session.seed)
        secrets.found.add(session.token)


async def buy(escrow: RunningEscrow, buyer: Any, url: str, path: Path, secrets: Secrets) -> None:
    """Everything that a buyer does: pay, stream, fail, be limited, be refused, close."""
    inner, _ = noting(secrets)
    wallet = Wallet(
        escrow=escrow.url,
        api_key=buyer.api_key,
        limits=Limits(per_request="0.02", total="1.00"),
        path=path / "wallet.db",
    )
    transport = PaymentTransport(wallet, inner())
    async with httpx.AsyncClient(transport=transport, headers=ASKED, base_url=url) as http:
        assert (await http.get("/item", params=QUERY)).status_code == 200
        assert (await http.get("/stream", params=QUERY)).status_code == 200
        assert (await http.get("/broken", params=QUERY)).status_code == 500
        keep_session_secrets(secrets, wallet)
        await send_by_hand(http, url, secrets)
    poor = Wallet(
        escrow=escrow.url,
        api_key=buyer.api_key,
        limits=Limits(per_request="0.0001", total="1.00"),
    )
    with pytest.raises(LimitExceeded):
        async with httpx.AsyncClient(transport=PaymentTransport(poor), base_url=url) as http:
            await http.get("/item", headers=ASKED, params=QUERY)


async def send_by_hand(http: httpx.AsyncClient, url: str, secrets: Secrets) -> None:
    """Sends a payment again, moved to another path, and mangled: refusals of several kinds."""
    sent = max((one for one in secrets.found if one.startswith("eyJ") and len(one) > 1500), key=len)
    async with httpx.AsyncClient(base_url=url) as plain:
        for path in ("/item", "/stream", "/nowhere"):
            for value in (sent, sent[:-8], "hush-junk"):
                payment = {headers.PAYMENT_SIGNATURE: value}
                answer = await plain.get(path, headers={**ASKED, **payment}, params=QUERY)
                assert answer.status_code < 500


def buy_plainly(escrow: RunningEscrow, buyer: Any, url: str, secrets: Secrets) -> None:
    """The same through the transport without an event loop."""
    _, inner = noting(secrets)
    limits = Limits(per_request="0.01", total="1.00")
    wallet = Wallet(escrow=escrow.url, api_key=buyer.api_key, limits=limits)
    transport = SyncPaymentTransport(wallet, inner())
    with httpx.Client(transport=transport, headers=ASKED, base_url=url) as http:
        assert http.get("/item", params=QUERY).status_code == 200
        keep_session_secrets(secrets, wallet)


async def test_no_record_tells_a_secret(tmp_path: Path) -> None:
    """Keys, seeds, tokens, vouchers, signatures, credentials and queries stay out of every log."""
    secrets = Secrets()
    secrets.add_bytes(ROOT_SEED)
    with hearing_everything() as ear:
        async with market(tmp_path, secrets) as (escrow, buyer, url):
            await buy(escrow, buyer, url, tmp_path, secrets)
            await anyio.to_thread.run_sync(buy_plainly, escrow, buyer, url, secrets)
            stranger = AsyncEscrowClient(escrow.url, "pf_live_hush-stranger")
            with pytest.raises(EscrowRefused):
                await stranger.me()
            await stranger.aclose()
    assert {"x402mw", "httpx", "httpcore", "sqlalchemy"} <= ear.loggers
    heard = "\n".join(ear.written)
    for event in ("charged", "refused", "session_closed", "limit_reached", "operation", "paid"):
        assert f"'event': '{event}'" in heard, event
    assert len(secrets.found) > 30
    assert secrets.told_in(ear.written) == []
    secrets.found.update(PRIVATE)
    assert secrets.told_in(ear.ours) == []

"""The peers: the official x402 SDK (`exact` and `batch-settlement`) and pympp, each as it ships.

Each is given its best case: no chain and no network behind it. The facilitator of `exact` says yes
in process; the channels of `batch-settlement` are seeded and stay fresh, so that nobody is asked;
pympp has a stub method that checks no signature.
"""

import base64
import json
import os
import time
from collections.abc import Callable
from typing import Any

import httpx
from eth_account import Account
from mpp import Challenge, Credential, Receipt
from mpp.methods import Method
from mpp.server import Mpp, ServerMethod, VerifyContext
from mpp.server.decorator import pay
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp
from x402 import x402ResourceServer
from x402.http.middleware.fastapi import PaymentMiddlewareASGI
from x402.mechanisms.evm.batch_settlement.client.channel import (
    BatchSettlementClientDeps,
    build_channel_config,
)
from x402.mechanisms.evm.batch_settlement.client.storage import InMemoryClientChannelStorage
from x402.mechanisms.evm.batch_settlement.client.voucher import sign_voucher
from x402.mechanisms.evm.batch_settlement.server import (
    BatchSettlementEvmScheme,
    BatchSettlementEvmSchemeServerConfig,
)
from x402.mechanisms.evm.batch_settlement.server.storage import Channel, InMemoryChannelStorage
from x402.mechanisms.evm.batch_settlement.types import ChannelConfig
from x402.mechanisms.evm.batch_settlement.utils import compute_channel_id
from x402.mechanisms.evm.exact import ExactEvmServerScheme
from x402.mechanisms.evm.signers import EthAccountSigner
from x402.schemas import (
    PaymentRequirements,
    SettleResponse,
    SupportedKind,
    SupportedResponse,
    VerifyResponse,
)

from bench import handlers

NETWORK = "eip155:84532"
PRICE = "$0.0001"
AMOUNT = 100
CHANNELS = 256
BUYER = Account.from_key("0x" + "11" * 32)
SELLER = Account.from_key("0x" + "22" * 32).address
_DAY_MS = 86_400_000
_EXACT, _BATCH = "exact", "batch-settlement"


class YesFacilitator:
    """A facilitator in process that agrees to everything at once."""

    def __init__(self, scheme: str) -> None:
        self._scheme = scheme

    async def verify(self, payload: Any, requirements: Any) -> VerifyResponse:
        """Says yes."""
        return VerifyResponse(is_valid=True, payer=BUYER.address)

    async def settle(self, payload: Any, requirements: Any) -> SettleResponse:
        """Says done."""
        return SettleResponse(
            success=True, transaction="0x" + "ab" * 32, network=NETWORK, payer=BUYER.address
        )

    def get_supported(self) -> SupportedResponse:
        """Names the one scheme."""
        extra = {"receiverAuthorizer": SELLER} if self._scheme == _BATCH else None
        kind = SupportedKind(x402_version=2, scheme=self._scheme, network=NETWORK, extra=extra)
        return SupportedResponse(kinds=[kind], extensions=[], signers={})


def _sell(scheme: str, server_scheme: Any) -> ASGIApp:
    server = x402ResourceServer(YesFacilitator(scheme))
    server.register(NETWORK, server_scheme)
    accepts = {"scheme": scheme, "payTo": SELLER, "price": PRICE, "network": NETWORK}
    app = handlers.bare()
    app.add_middleware(
        PaymentMiddlewareASGI, routes={"GET /item": {"accepts": accepts}}, server=server
    )
    return app


def exact() -> ASGIApp:
    """The SDK's middleware with `exact`."""
    return _sell(_EXACT, ExactEvmServerScheme())


def batch() -> ASGIApp:
    """The SDK's middleware with `batch-settlement`; all channels are open and funded."""
    storage = InMemoryChannelStorage()
    for config in channel_configs():
        name = compute_channel_id(config, NETWORK)
        channel = Channel(
            channel_id=name,
            channel_config=config,
            balance=str(10**12),
            onchain_synced_at=int(time.time() * 1000),
        )
        storage.update_channel(name, lambda _, channel=channel: channel)
    settings = BatchSettlementEvmSchemeServerConfig(storage=storage, onchain_state_ttl_ms=_DAY_MS)
    return _sell(_BATCH, BatchSettlementEvmScheme(SELLER, settings))


def channel_configs() -> list[ChannelConfig]:
    """The channels of the one buyer, told apart by their salt."""
    requirements = PaymentRequirements(
        scheme=_BATCH,
        network=NETWORK,
        asset="0x036CbD53842c5426634e7929541eC2318f3dCF7e",
        amount=str(AMOUNT),
        pay_to=SELLER,
        max_timeout_seconds=300,
        extra={"receiverAuthorizer": SELLER, "withdrawDelay": 900},
    )
    signer, storage = EthAccountSigner(BUYER), InMemoryClientChannelStorage()
    return [
        build_channel_config(
            BatchSettlementClientDeps(signer, storage, f"0x{number:064x}"), requirements
        )
        for number in range(CHANNELS)
    ]


class _StubRequest(BaseModel):
    amount: str
    currency: str = "usd"
    recipient: str = "bench"


class _StubPayload(BaseModel):
    signature: str


STUB = Method(name="stub", intent="charge", request_model=_StubRequest, payload_model=_StubPayload)


async def _stub_verify(context: VerifyContext) -> Receipt:
    return Receipt.success(context.credential.payload.signature, method="stub")


def mpp() -> ASGIApp:
    """The app under pympp's decorator, with a method that checks no signature."""
    method = ServerMethod(method=STUB, verify=_stub_verify)
    engine = Mpp(methods=method, realm="bench", secret_key="0123456789abcdef" * 2)

    @pay(engine.stub.charge(amount=str(AMOUNT)))
    async def item(request: Request, credential: Credential, receipt: Receipt) -> Response:
        return await handlers.item(request)

    return Starlette(routes=[Route("/item", item)])


APPS: dict[str, Callable[[], ASGIApp]] = {
    "x402-exact": exact,
    "x402-batch": batch,
    "pympp": mpp,
}


# What their buyers send. One request per entry, made before the clock starts.


def _request(port: int, name: bytes, value: bytes) -> bytes:
    return b"GET /item HTTP/1.1\r\nhost: 127.0.0.1:%d\r\n%s: %s\r\n\r\n" % (port, name, value)


def _offer(port: int) -> dict[str, Any]:
    answer = httpx.get(f"http://127.0.0.1:{port}/item")
    content = json.loads(base64.b64decode(answer.headers["payment-required"]))
    found: dict[str, Any] = content["accepts"][0]
    return found


def _encode(payload: dict[str, Any], offer: dict[str, Any]) -> bytes:
    content = {"x402Version": 2, "payload": payload, "accepted": offer}
    return base64.b64encode(json.dumps(content, separators=(",", ":")).encode())


class ExactBuyer:
    """Payments for `exact`; nobody in the server checks the signature, so it stays the same."""

    def __init__(self, port: int) -> None:
        self._port, self._offer = port, _offer(port)

    def requests(self, target: str, count: int) -> list[bytes]:
        """Whole requests, each with a nonce of its own."""
        authorization = {
            "from": BUYER.address,
            "to": SELLER,
            "value": str(AMOUNT),
            "validAfter": "0",
            "validBefore": str(int(time.time()) + 600),
        }
        return [
            _request(
                self._port,
                b"payment-signature",
                _encode(
                    {
                        "authorization": {**authorization, "nonce": "0x" + os.urandom(32).hex()},
                        "signature": "0x" + "ab" * 65,
                    },
                    self._offer,
                ),
            )
            for _ in range(count)
        ]


class BatchBuyer:
    """Vouchers for `batch-settlement`, signed by the SDK; each channel grows in steps."""

    def __init__(self, port: int) -> None:
        self._port, self._offer = port, _offer(port)
        self._signer = EthAccountSigner(BUYER)
        self._configs = channel_configs()
        self._names = [compute_channel_id(config, NETWORK) for config in self._configs]
        self._next = 0

    def requests(self, target: str, count: int) -> list[bytes]:
        """Whole requests, the channels in turn."""
        return [self._one() for _ in range(count)]

    def _one(self) -> bytes:
        steps, number = divmod(self._next, CHANNELS)
        self._next += 1
        cumulative = (steps + 1) * AMOUNT
        voucher = sign_voucher(self._signer, self._names[number], cumulative, NETWORK)
        payload = {
            "type": "voucher",
            "channelConfig": self._configs[number].to_dict(),
            "voucher": voucher.to_dict(),
        }
        return _request(self._port, b"payment-signature", _encode(payload, self._offer))


class MppBuyer:
    """Credentials for pympp: one fresh challenge a round, a payload of its own for each request."""

    def __init__(self, port: int) -> None:
        self._port = port

    def requests(self, target: str, count: int) -> list[bytes]:
        """Whole requests."""
        answer = httpx.get(f"http://127.0.0.1:{self._port}{target}")
        echo = Challenge.from_www_authenticate(answer.headers["www-authenticate"]).to_echo()
        made = []
        for _ in range(count):
            credential = Credential(challenge=echo, payload={"signature": os.urandom(32).hex()})
            value = credential.to_authorization().encode()
            made.append(_request(self._port, b"authorization", value))
        return made


BUYERS: dict[str, Callable[[int], Any]] = {
    "x402-exact": ExactBuyer,
    "x402-batch": BatchBuyer,
    "pympp": MppBuyer,
}

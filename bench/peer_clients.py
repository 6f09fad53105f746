"""The peers' own clients, for the buyer's side of the comparison."""

import base64
import json
from typing import Any

import httpx
from mpp import Credential
from mpp.client import ClientMethod, CredentialParams
from mpp.client import PaymentTransport as MppTransport
from x402 import x402Client
from x402.http.clients.httpx import x402AsyncTransport
from x402.mechanisms.evm.batch_settlement.client import BatchSettlementEvmScheme
from x402.mechanisms.evm.batch_settlement.client.config import BatchSettlementEvmSchemeOptions
from x402.mechanisms.evm.batch_settlement.client.storage import (
    BatchSettlementClientContext,
    InMemoryClientChannelStorage,
)
from x402.mechanisms.evm.batch_settlement.utils import compute_channel_id
from x402.mechanisms.evm.exact import register_exact_evm_client
from x402.mechanisms.evm.signers import EthAccountSigner

from bench import peers
from bench.client import Canned, Reply
from bench.processes import Process
from bench.servers import Servers


def _sdk_reply(shop: Process, payment: bytes, *, cumulative: bool) -> Reply:
    """The real server's answers again; for channels the totals go on from where they were."""
    terms = httpx.get(f"{shop.url}/item")
    header = dict(line.split(": ") for line in payment.decode().strip().split("\r\n")[1:])
    paid = httpx.get(f"{shop.url}/item", headers=header)
    if paid.status_code != 200:
        raise RuntimeError(f"{shop.name} answered {paid.status_code}")
    word = json.loads(base64.b64decode(paid.headers["payment-response"]))
    charged = 0

    def reply(request: httpx.Request) -> httpx.Response:
        nonlocal charged
        if "payment-signature" not in request.headers:
            return httpx.Response(402, headers=terms.headers, content=terms.content)
        fields = dict(paid.headers)
        if cumulative:
            charged += peers.AMOUNT
            state = {**word["extra"]["channelState"], "chargedCumulativeAmount": str(charged)}
            extra = {**word["extra"], "channelState": state}
            now = {**word, "extra": extra}
            fields["payment-response"] = base64.b64encode(json.dumps(now).encode()).decode()
        return httpx.Response(200, headers=fields, content=paid.content)

    return reply


def _exact(shop: Process) -> tuple[httpx.AsyncClient, Canned, str]:
    payment = peers.ExactBuyer(shop.port).requests("/item", 1)[0]
    canned = Canned(_sdk_reply(shop, payment, cumulative=False))
    client = x402Client()
    register_exact_evm_client(client, EthAccountSigner(peers.BUYER))
    http = httpx.AsyncClient(transport=x402AsyncTransport(client, canned))
    return http, canned, f"{shop.url}/item"


def _batch(shop: Process, payment: bytes) -> tuple[httpx.AsyncClient, Canned, str]:
    canned = Canned(_sdk_reply(shop, payment, cumulative=True))
    storage = InMemoryClientChannelStorage()
    name = compute_channel_id(peers.channel_configs()[0], peers.NETWORK)
    storage.set(name, BatchSettlementClientContext("0", str(10**12), "0"))
    client = x402Client()
    options = BatchSettlementEvmSchemeOptions(storage=storage)
    client.register(peers.NETWORK, BatchSettlementEvmScheme(peers.BUYER, options))
    http = httpx.AsyncClient(transport=x402AsyncTransport(client, canned))
    return http, canned, f"{shop.url}/item"


def _mpp(shop: Process) -> tuple[httpx.AsyncClient, Canned, str]:
    terms = httpx.get(f"{shop.url}/item")
    payment = peers.MppBuyer(shop.port).requests("/item", 1)[0].decode()
    value = payment.partition("authorization: ")[2].strip()
    paid = httpx.get(f"{shop.url}/item", headers={"authorization": value})

    def reply(request: httpx.Request) -> httpx.Response:
        recorded = paid if "authorization" in request.headers else terms
        return httpx.Response(
            recorded.status_code, headers=recorded.headers, content=recorded.content
        )

    async def create(params: CredentialParams) -> str:
        payload = {"signature": "ab" * 32}
        return Credential(params.challenge.to_echo(), payload).to_authorization()

    canned = Canned(reply)
    method = ClientMethod(method=peers.STUB, create_credential=create)
    return httpx.AsyncClient(transport=MppTransport([method], canned)), canned, f"{shop.url}/item"


def clients(servers: Servers) -> dict[str, Any]:
    """(client, its canned transport, address) of each peer."""
    shops, buyers = servers.running, servers.buyers
    # A channel takes its very next voucher only, so it is the buyer of the rounds who signs.
    voucher = buyers["x402-batch"].requests("/item", 1)[0]
    return {
        "x402-exact": _exact(shops["x402-exact"]),
        "x402-batch": _batch(shops["x402-batch"], voucher),
        "pympp": _mpp(shops["pympp"]),
    }

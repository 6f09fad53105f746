"""The buyer's side: an httpx transport that pays per request, within limits.

    wallet = Wallet(escrow=..., api_key=..., limits=Limits(per_request="0.01", total="1.00"))
    async with httpx.AsyncClient(transport=PaymentTransport(wallet)) as http: ...

`EscrowClient` and `AsyncEscrowClient` do all that the escrow's API can. All errors are
`X402mwError`; its `moved` tells whether money may have moved.
"""

from x402mw.core.errors import (
    AccountsDiffer,
    EscrowRefused,
    EscrowUnavailable,
    LimitExceeded,
    PaidOutcomeGone,
    PaymentOutcomeUnknown,
    PaymentRefused,
    X402mwError,
)
from x402mw_client.escrow import AsyncEscrowClient, EscrowClient
from x402mw_client.flow import PaymentHandle
from x402mw_client.limits import Limits
from x402mw_client.receipts import ReceiptRefused, SignedReceipt
from x402mw_client.sessions import Paid
from x402mw_client.transport import PaymentTransport, SyncPaymentTransport
from x402mw_client.wallet import Wallet

__all__ = [
    "AccountsDiffer",
    "AsyncEscrowClient",
    "EscrowClient",
    "EscrowRefused",
    "EscrowUnavailable",
    "LimitExceeded",
    "Limits",
    "Paid",
    "PaidOutcomeGone",
    "PaymentHandle",
    "PaymentOutcomeUnknown",
    "PaymentRefused",
    "PaymentTransport",
    "ReceiptRefused",
    "SignedReceipt",
    "SyncPaymentTransport",
    "Wallet",
    "X402mwError",
]

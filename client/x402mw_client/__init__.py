"""The buyer's side: an httpx transport that pays per request, within limits.

    wallet = Wallet(escrow=..., api_key=..., limits=Limits(per_request="0.01", total="1.00"))
    async with httpx.AsyncClient(transport=PaymentTransport(wallet)) as http: ...

All errors are `X402mwError`; its `moved` tells whether money may have moved.
"""

from x402mw.core.errors import (
    AccountsDiffer,
    LimitExceeded,
    PaidOutcomeGone,
    PaymentOutcomeUnknown,
    PaymentRefused,
    X402mwError,
)
from x402mw_client.flow import PaymentHandle
from x402mw_client.limits import Limits
from x402mw_client.receipts import ReceiptRefused, SignedReceipt
from x402mw_client.sessions import Paid
from x402mw_client.transport import PaymentTransport, SyncPaymentTransport
from x402mw_client.wallet import Wallet

__all__ = [
    "AccountsDiffer",
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

"""For those who sell: one ASGI middleware, a price list, and a provider's identity.

from x402mw.provider import PaymentMiddleware, PerCall, PerUnit, Provider
"""

from x402mw.core.pricing import FREE, PerCall, PerUnit
from x402mw.provider.decorator import free, priced
from x402mw.provider.meter import Payment
from x402mw.provider.middleware import PaymentMiddleware
from x402mw.provider.prices import Priced, PriceList
from x402mw.provider.provider import Provider

__all__ = [
    "FREE",
    "Payment",
    "PaymentMiddleware",
    "PerCall",
    "PerUnit",
    "PriceList",
    "Priced",
    "Provider",
    "free",
    "priced",
]

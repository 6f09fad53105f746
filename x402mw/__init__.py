"""The payment layer that software uses to pay software.

Nothing is re-exported here, so that `import x402mw` stays light. Import from the room that owns
the thing: `x402mw.provider.PaymentMiddleware`, `x402mw_client.PaymentTransport`.
"""

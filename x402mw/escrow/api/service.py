"""Routes about the service itself, outside the base path."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from x402mw.core.strict import b64url_encode
from x402mw.escrow.api import account_answers as answers
from x402mw.escrow.api.routes import OPEN, Route, Routes
from x402mw.escrow.api.shared import find_ledger


async def show_health(request: Request) -> Response:
    """GET /health."""
    ledger = find_ledger(request)
    return JSONResponse({"status": "ok", "network": ledger.settings.network, "time": ledger.now()})


async def show_signing_keys(request: Request) -> Response:
    """GET /.well-known/x402mw-keys."""
    ledger = find_ledger(request)
    return JSONResponse(
        {
            "network": ledger.settings.network,
            "root_key": b64url_encode(ledger.signer.root_key),
            "key_set": await ledger.key_set(),
        }
    )


ROUTES: Routes = (
    Route(
        *("GET", "/health", OPEN, show_health),
        "Shows that the service answers.",
        answers.Health,
    ),
    Route(
        *("GET", "/.well-known/x402mw-keys", OPEN, show_signing_keys),
        "Shows the keys that tokens are signed with, vouched for by the root key.",
        answers.SigningKeys,
    ),
)

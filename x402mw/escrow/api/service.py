"""Routes about the service itself, outside the base path."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from x402mw.core.strict import b64url_encode
from x402mw.escrow.api import account_answers as answers
from x402mw.escrow.api import page
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


async def show_document(request: Request) -> Response:
    """GET /openapi.json."""
    return Response(request.app.state.documents.json, media_type="application/json")


async def show_page(request: Request) -> Response:
    """GET /docs."""
    headers = {"Content-Security-Policy": page.POLICY}
    return Response(request.app.state.documents.page, headers=headers, media_type="text/html")


ROUTES: Routes = (
    Route(
        *("GET", "/openapi.json", OPEN, show_document),
        "Shows this document, for machines.",
        None,
        media="application/json",
    ),
    Route(
        *("GET", "/docs", OPEN, show_page),
        "Shows this document, for people.",
        None,
        media="text/html",
    ),
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

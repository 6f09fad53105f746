"""HTTP in and out for the escrow: bodies with a limit, strict JSON, and problems for everything.

Nothing about money is decided here. `docs/escrow.md` lists the answers.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from x402mw.core.errors import Malformed
from x402mw.core.strict import loads_object
from x402mw.escrow.database import is_unavailable
from x402mw.escrow.errors import Refused
from x402mw.escrow.idempotency import Answer
from x402mw.escrow.observing import REASON

BODY_BYTES_MAX = 64 * 1024
BODY_VALUES_MAX = 5000
BODY_SECONDS_MAX = 30
VALUE_BYTES = 128
"""Counted by commas before parsing: a body of tiny values would keep everyone waiting. A shorter
body has fewer, one for so many bytes of its limit: 512 in what anybody may send."""

FIELD_CHARACTERS_MAX = 100
PROBLEM_TYPE = "application/problem+json"
NUMBER = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)
_JSON = re.compile(
    r"application/([\w.!#$&^-]+\+)?json(\s*;\s*charset=(\"?)utf-?8\3)?\s*", re.ASCII | re.IGNORECASE
)
# The rest of the body is not read, so the connection cannot be used again.
_CLOSE = {"Connection": "close"}
_CODES = {404: "not_found", 405: "method_not_allowed"}

Model = TypeVar("Model", bound=BaseModel)


async def read_body(request: Request, bytes_max: int = BODY_BYTES_MAX) -> dict[str, Any]:
    """Reads a JSON object of limited size; no body at all is an empty object."""
    if _announced_bytes(request) > bytes_max:
        raise _too_large(bytes_max)
    raw = await _collect(request, bytes_max)
    if raw:
        _check_media_type(request)
    values_max = min(BODY_VALUES_MAX, bytes_max // VALUE_BYTES)
    if raw.count(b",") >= values_max:
        raise Refused(413, "body_too_large", f"a body has at most {values_max} values here")
    try:
        return loads_object(bytes(raw)) if raw.strip() else {}
    except Malformed as error:
        raise Refused(400, "malformed", str(error)) from None


async def _collect(request: Request, bytes_max: int) -> bytearray:
    """The body; of one that is too large some more is read, and dropped.

    Who is still sending when the connection is closed may never read why.
    """
    raw, seen = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS_MAX):
            async for chunk in request.stream():
                seen += len(chunk)
                if seen <= bytes_max:
                    raw += chunk
                elif seen > 2 * bytes_max:
                    break
    except TimeoutError:
        detail = f"a body is here within {BODY_SECONDS_MAX} seconds"
        raise Refused(408, "body_timeout", detail, headers=_CLOSE) from None
    if seen > bytes_max:
        raise _too_large(bytes_max)
    return raw


def _check_media_type(request: Request) -> None:
    """JSON, or not said to be anything: whatever else a client names, it does not mean JSON."""
    text = request.headers.get("content-type", "application/json")
    if not _JSON.fullmatch(text) or "content-encoding" in request.headers:
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        detail = "a body is application/json in UTF-8, and not compressed"
        raise Refused(415, "unsupported_media_type", detail, headers=headers)


def _announced_bytes(request: Request) -> int:
    text = request.headers.get("content-length", "0")
    if not NUMBER.fullmatch(text):
        raise Refused(400, "malformed", "Content-Length is not a number")
    return int(text)


def _too_large(bytes_max: int) -> Refused:
    detail = f"a body has at most {bytes_max} bytes here"
    return Refused(413, "body_too_large", detail, headers=_CLOSE)


def parse(model: type[Model], value: dict[str, Any]) -> Model:
    """Validates a parsed body; the refusal names the fields and repeats none of their values."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        fields = [
            {
                "field": ".".join(map(str, found["loc"]))[:FIELD_CHARACTERS_MAX],
                "message": found["msg"],
            }
            for found in error.errors(include_url=False, include_input=False, include_context=False)
        ]
        first = fields[0]
        raise Refused(
            422, "invalid_request", f"{first['field']}: {first['message']}", errors=fields[:20]
        ) from None


def respond(answer: Answer) -> Response:
    """Writes a ledger's answer."""
    headers = {"Idempotent-Replayed": "true"} if answer.replayed else {}
    media_type = PROBLEM_TYPE if answer.status >= 400 else "application/json"
    return Response(answer.body, answer.status, headers, media_type)


def problem_response(refusal: Refused) -> Response:
    """Writes a refusal as a problem document."""
    return JSONResponse(refusal.problem(), refusal.status, refusal.headers, PROBLEM_TYPE)


# What an exception becomes. Its text never leaves, except of refusals, which are written for it.


async def on_refused(request: Request, error: Exception) -> Response:
    """Answers a refusal."""
    if not isinstance(error, Refused):
        raise error
    request.scope[REASON] = error.reason
    return problem_response(error)


async def on_http(_request: Request, error: Exception) -> Response:
    """Answers what the router refuses: unknown paths and methods."""
    if not isinstance(error, HTTPException):
        raise error
    code = _CODES.get(error.status_code, "malformed")
    headers = dict(error.headers or {})
    return problem_response(
        Refused(error.status_code, code, "there is no such path or method here", headers=headers)
    )


async def on_disconnect(_request: Request, _error: Exception) -> Response:
    """Answers nobody: the client went away while it was still sending."""
    return Response(status_code=400)


async def on_error(_request: Request, error: Exception) -> Response:
    """Answers a failure of ours: 503 if trying again may help, else 500."""
    # This answer is written outside of `Stamped`, so it stamps itself.
    date = formatdate(usegmt=True)
    if is_unavailable(error):
        headers = {"Date": date, "Retry-After": "2"}
        detail = "the escrow cannot reach its books right now"
        return problem_response(Refused(503, "unavailable", detail, headers=headers))
    detail = "the escrow failed and cannot say more here; repeat with the same idempotency key"
    return problem_response(Refused(500, "internal", detail, headers={"Date": date}))


EXCEPTION_HANDLERS: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
    Refused: on_refused,
    HTTPException: on_http,
    ClientDisconnect: on_disconnect,
    Exception: on_error,
}


class Stamped:
    """Stamps each answer with `Date` by the ledger's clock, which providers compare to theirs.

    And with `no-store`, because most answers are somebody's money.
    """

    def __init__(self, app: ASGIApp, clock: Callable[[], float]) -> None:
        self._app = app
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes everything through and adds two headers."""

        async def send_stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Date"] = formatdate(self._clock(), usegmt=True)
                headers["Cache-Control"] = "no-store"
            await send(message)

        await self._app(scope, receive, send_stamped)

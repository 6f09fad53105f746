"""What a request is, as the provider's own configuration sees it.

Nothing a header says decides a URL, a price or a payee: the Host header only selects one of the
configured origins (`docs/protocol.md`, Encodings).
"""

import asyncio
import hashlib
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote, urlsplit

from starlette.types import Message, Receive, Scope

from x402mw.core.errors import ConfigurationError
from x402mw.core.gate import Refused

BODY_SECONDS_MAX = 30
SIGNATURE_HEADER = b"payment-signature"
_LOOPBACK = re.compile(r"(?:localhost|127(?:\.[0-9]{1,3}){3}|\[::1\])(?::[0-9]{1,5})?", re.ASCII)
_PORTS = {"http": ":80", "https": ":443"}
_DROPPED_EXTENSIONS = (
    "http.response.pathsend",
    "http.response.zerocopysend",
    "http.response.early_hint",
    "http.response.trailers",
    "http.response.push",
)


class Origins:
    """The origins a provider is known by; a loopback Host needs none to be configured."""

    def __init__(self, origins: Iterable[str]) -> None:
        """Takes origins such as "https://api.example.com"; raises `ConfigurationError`."""
        self._by_host: dict[str, str] = {}
        for text in origins:
            origin = normal_origin(text)
            scheme, _, host = origin.partition("://")
            spellings = [host] if re.search(r":[0-9]+$", host) else [host, host + _PORTS[scheme]]
            for spelling in spellings:
                if self._by_host.setdefault(spelling, origin) != origin:
                    raise ConfigurationError(f"{host} is configured as two origins")

    @property
    def sample_host(self) -> bytes:
        """A Host that is known here, for self-tests."""
        return next(iter(self._by_host), "localhost").encode()

    def select(self, scope: Scope) -> str:
        """Returns the origin a request is for, or raises `Refused` with 421."""
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        host = hosts[0].decode("latin-1").lower() if len(hosts) == 1 else ""
        known = self._by_host.get(host)
        if known is not None:
            return known
        if _LOOPBACK.fullmatch(host):
            scheme = str(scope.get("scheme", "http"))
            return f"{scheme}://{host.removesuffix(_PORTS.get(scheme, '!'))}"
        raise Refused(421, "unknown_host", "this host name is not one of this provider's origins")


def normal_origin(text: str) -> str:
    """Writes an origin in its one form: lower case, IDNA, default port left out."""
    try:
        parts = urlsplit(text)
        host, port = (parts.hostname or "").encode("idna").decode("ascii"), parts.port
    except ValueError:
        raise ConfigurationError(f"{text!r} is not an origin") from None
    rest = (parts.path.rstrip("/"), parts.query, parts.fragment, parts.username)
    if parts.scheme not in _PORTS or not host or any(rest):
        raise ConfigurationError(f'an origin is written like "https://api.example.com": {text!r}')
    if ":" in host:
        host = f"[{host}]"
    shown = "" if port is None or f":{port}" == _PORTS[parts.scheme] else f":{port}"
    return f"{parts.scheme}://{host}{shown}"


def route_path(scope: Scope) -> str:
    """The decoded path as the app's router sees it: without the server's root path."""
    return _without_root(str(scope["path"]), str(scope.get("root_path", "")))


def _without_root(path: str, root: str) -> str:
    inside = root and (path == root or path.startswith(root + "/"))
    return path[len(root) :] if inside else path


def target(scope: Scope, path_prefix: str) -> str:
    """The path and query as the buyer sent them: what its voucher is signed for."""
    raw = scope.get("raw_path")
    path = raw.decode("latin-1") if raw else quote(str(scope["path"]), safe="/%:@!$&'()*+,;=~")
    root = quote(str(scope.get("root_path", "")), safe="/%:@!$&'()*+,;=~")
    path = _without_root(path.partition("?")[0], root)
    query = scope.get("query_string", b"").decode("latin-1")
    return path_prefix + path + (f"?{query}" if query else "")


def payment_headers(scope: Scope) -> list[bytes]:
    """The values of all payment headers of a request, usually none or one."""
    return [value for name, value in scope["headers"] if name == SIGNATURE_HEADER]


def credentials(scope: Scope) -> bytes:
    """Hashes who is asking: every Authorization and Cookie field, in order."""
    found = hashlib.sha256()
    for name, value in scope["headers"]:
        if name in (b"authorization", b"cookie"):
            found.update(len(name).to_bytes(2, "big") + name + len(value).to_bytes(4, "big"))
            found.update(value)
    return found.digest()


def paid_scope(scope: Scope, payment: Any) -> Scope:
    """The scope the app sees of a paid request: with its meter, without the payment header.

    Ways of answering that would bypass the metered `send` are taken away.
    """
    extensions = {
        name: value
        for name, value in (scope.get("extensions") or {}).items()
        if name not in _DROPPED_EXTENSIONS
    }
    kept = [(name, value) for name, value in scope["headers"] if name != SIGNATURE_HEADER]
    state = {**scope.get("state", {}), "payment": payment}
    return {**scope, "headers": kept, "extensions": extensions, "state": state}


def show_route(scope: Scope, paid: Scope) -> None:
    """Shows outer middleware where the app's router led a paid request, as without a payment."""
    for name in ("endpoint", "path_params", "route"):
        if name in paid:
            scope[name] = paid[name]


async def read_body(scope: Scope, receive: Receive, bytes_max: int) -> tuple[bytes, bytes]:
    """Returns the request body and its SHA-256, as vouchers bind it.

    Raises `Refused`: 413 when the body is too long, 408 when it comes too slowly.
    """
    if _has_no_body(scope):
        # Nothing is waited for; a timer would cost more than all the rest.
        return await _collect(receive, bytes_max)
    try:
        async with asyncio.timeout(BODY_SECONDS_MAX):
            return await _collect(receive, bytes_max)
    except TimeoutError:
        raise Refused(408, "body_timeout", "the request body came too slowly") from None


def check_length(scope: Scope, bytes_max: int) -> None:
    """Refuses a body whose Content-Length is over the limit, before a byte of it is read."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value[:20]) > bytes_max:
            raise too_large(bytes_max)


def _has_no_body(scope: Scope) -> bool:
    """Whether the head of an HTTP/1.1 request says that it ends there (RFC 9112, 6.3)."""
    return scope.get("http_version") == "1.1" and not any(
        name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"]
    )


async def _collect(receive: Receive, bytes_max: int) -> tuple[bytes, bytes]:
    chunks: list[bytes] = []
    # Hashed as it comes, so that a long body never holds up other requests.
    digest = hashlib.sha256()
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > bytes_max:
            raise too_large(bytes_max)
        chunks.append(chunk)
        digest.update(chunk)
        more = message.get("more_body", False)
    return b"".join(chunks), digest.digest()


def too_large(bytes_max: int) -> Refused:
    """The refusal of a request body over the route's limit."""
    return Refused(413, "body_too_large", f"this route takes bodies of up to {bytes_max} bytes")


class Disconnected(Exception):
    """The buyer went away before its request was complete."""


def replay_body(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives an already read body once, and then what the server says."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay

"""A small proxy on a real socket, which can be told to misbehave in any way."""

import gzip
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import formatdate
from time import time

import httpx
from starlette.types import Receive, Scope, Send

from tests.support.serving import serving

Headers = list[tuple[bytes, bytes]]
HOP = (b"connection", b"transfer-encoding", b"content-length")


@dataclass
class Asked:
    """A request on its way to the provider; whatever is changed here is what it will see."""

    method: str
    target: str
    headers: Headers
    body: bytes

    def header(self, name: bytes) -> bytes | None:
        """A field's value."""
        return dict(self.headers).get(name)


@dataclass
class Given:
    """An answer on its way to the client."""

    status: int
    headers: Headers
    body: bytes = b""

    def header(self, name: bytes) -> bytes:
        """A field's value, empty if it is not there."""
        return dict(self.headers).get(name, b"")

    def put(self, name: bytes, *values: bytes) -> None:
        """Sets a field, or drops it."""
        self.headers = [one for one in self.headers if one[0] != name]
        self.headers += [(name, value) for value in values]

    def zip(self) -> None:
        """Compresses the body."""
        self.body = gzip.compress(self.body)
        self.put(b"content-encoding", b"gzip")


def _as_it_is(*_: object) -> None:
    return None


class Proxy:
    """An ASGI app that passes requests on; `ask` and `give` may change them, or answer at once."""

    def __init__(self, upstream: str, http: httpx.AsyncClient) -> None:
        self.upstream = upstream
        self._http = http
        self.url = ""
        self.behave()

    def behave(
        self,
        *,
        ask: Callable[[Asked], Given | None] = _as_it_is,
        give: Callable[[Asked, Given], None] = _as_it_is,
    ) -> None:
        """Misbehaves like this from now on; without arguments not at all."""
        self._ask, self._give = ask, give

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        query = scope["query_string"].decode()
        target = scope["raw_path"].decode() + (f"?{query}" if query else "")
        kept = [(name, value) for name, value in scope["headers"] if name not in HOP]
        asked = Asked(scope["method"], target, kept, body)
        given = self._ask(asked) or await self._pass_on(asked)
        self._give(asked, given)
        length = (b"content-length", str(len(given.body)).encode())
        start = {"type": "http.response.start", "status": given.status}
        await send({**start, "headers": [*given.headers, length]})
        shown = b"" if scope["method"] == "HEAD" else given.body
        await send({"type": "http.response.body", "body": shown})

    async def _pass_on(self, asked: Asked) -> Given:
        url = httpx.URL(self.upstream).copy_with(raw_path=asked.target.encode())
        request = httpx.Request(asked.method, url, headers=asked.headers, content=asked.body)
        answer = await self._http.send(request)
        kept = [
            (name.lower(), value) for name, value in answer.headers.raw if name.lower() not in HOP
        ]
        given = Given(answer.status_code, kept, answer.content)
        if not given.header(b"date"):
            given.put(b"date", formatdate(time(), usegmt=True).encode())
        return given


@asynccontextmanager
async def proxying(upstream: str) -> AsyncIterator[Proxy]:
    """Runs a proxy in front of a server."""
    async with httpx.AsyncClient(trust_env=False, timeout=10, verify=False) as http:
        proxy = Proxy(upstream, http)
        async with serving(proxy) as url:
            proxy.url = url
            yield proxy

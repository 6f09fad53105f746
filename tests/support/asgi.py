"""Raw ASGI calls for tests: what a server would say to an app, and what the app answered."""

import asyncio
import json
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from starlette.types import ASGIApp, Message, Scope

from x402mw.core.strict import b64_decode

HOST = b"api.example.com"
Headers = Iterable[tuple[bytes, bytes]]


@dataclass
class Answer:
    """What a raw ASGI call was answered; `problem` and `paid` are decoded."""

    messages: list[Message] = field(default_factory=list)

    @property
    def status(self) -> int:
        """The status, 0 if there was no answer."""
        return next((m["status"] for m in self.messages if "status" in m), 0)

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """The header fields."""
        return next((list(m["headers"]) for m in self.messages if "status" in m), [])

    @property
    def body(self) -> bytes:
        """The whole body."""
        return b"".join(m.get("body", b"") for m in self.messages)

    @property
    def finished(self) -> bool:
        """Whether the last byte was sent."""
        return any(
            m["type"] == "http.response.body" and not m.get("more_body") for m in self.messages
        )

    def header(self, name: str) -> str | None:
        """The one field of this name."""
        values = [value for key, value in self.headers if key.lower() == name.lower().encode()]
        assert len(values) <= 1, f"{name} is there {len(values)} times"
        return values[0].decode() if values else None

    @property
    def problem(self) -> dict[str, Any]:
        """The problem document."""
        assert self.header("content-type") == "application/problem+json"
        content: dict[str, Any] = json.loads(self.body)
        assert content["status"] == self.status
        return content

    @property
    def paid(self) -> dict[str, Any] | None:
        """The content of `PAYMENT-RESPONSE`."""
        value = self.header("payment-response")
        return None if value is None else json.loads(b64_decode(value.encode()))

    @property
    def account(self) -> tuple[str, str, str]:
        """(state, charge, charged total) of `PAYMENT-RESPONSE`."""
        paid = self.paid
        assert paid is not None
        return paid["extra"]["state"], paid["amount"], paid["extra"].get("chargedTotal", "")


class Line:
    """One connection: gives the request's body in chunks, then waits until the buyer goes away."""

    def __init__(self, chunks: Iterable[bytes] = (b"",)) -> None:
        self._chunks = list(chunks)
        self.gone = asyncio.Event()
        self.answer = Answer()
        self.sent = asyncio.Condition()

    async def receive(self) -> Message:
        """What the app hears."""
        if self._chunks:
            body = self._chunks.pop(0)
            return {"type": "http.request", "body": body, "more_body": bool(self._chunks)}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """What the app says."""
        async with self.sent:
            self.answer.messages.append(message)
            self.sent.notify_all()

    async def until(self, count: int) -> None:
        """Waits for so many messages of the answer."""
        async with asyncio.timeout(10), self.sent:
            await self.sent.wait_for(lambda: len(self.answer.messages) >= count)


def make_scope(
    method: str, target: str, headers: Headers = (), *, host: bytes | None = HOST, **changes: Any
) -> Scope:
    """An HTTP scope as a server makes it from a request line and header fields."""
    path, _, query = target.partition("?")
    found = [(name.lower(), value) for name, value in headers]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "https",
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(b"host", host), *found] if host is not None else found,
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 4242),
        "state": {},
        **changes,
    }


async def call(
    app: ASGIApp,
    method: str,
    target: str,
    headers: Headers = (),
    *,
    body: bytes = b"",
    chunks: Iterable[bytes] | None = None,
    **changes: Any,
) -> Answer:
    """Sends one raw ASGI request and returns the answer, whatever it is.

    What the app raises after a whole answer is raised here too, with the answer in its `answer`.
    """
    line = Line([body] if chunks is None else chunks)
    try:
        await app(make_scope(method, target, headers, **changes), line.receive, line.send)
    except Exception as error:
        error.answer = line.answer  # type: ignore[attr-defined] # a note for the test
        raise
    return line.answer


async def answer_of(calling: Awaitable[Answer]) -> Answer:
    """The answer to a call, also if the app raised after giving it."""
    try:
        return await calling
    except Exception as error:
        answer: Answer | None = getattr(error, "answer", None)
        if answer is None:
            raise
        return answer

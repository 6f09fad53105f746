"""The floor: the least a server must do to be paid this way, as a bare skeleton.

Parse, look the session up, compare the cumulative amounts, verify, add up, append to a journal,
answer a header. No configuration, expiry, retries, replay store, charge table, metering or error
detail: it bounds what the middleware can reach, and is no product.
"""

import asyncio
import base64
import json
import os
import tempfile
import threading
from dataclasses import dataclass

from nacl import bindings
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bench import handlers

AMOUNT = 100
COMMIT_SECONDS = 0.005
HEADER = b"payment-signature"
_UNPAID = b'{"code":"payment_required"}'
_UNPAID_START = {
    "type": "http.response.start",
    "status": 402,
    "headers": [
        (
            b"payment-required",
            base64.b64encode(b'{"x402Version":2,"accepts":[' + b" " * 600 + b"]}"),
        ),
        (b"content-length", str(len(_UNPAID)).encode()),
    ],
}


@dataclass(slots=True)
class Session:
    """What is known of a session."""

    key: bytes
    best: int = 0
    charged: int = 0


class FileJournal:
    """A file that one thread appends to and syncs, everything that waits at once."""

    def __init__(self, *, wait: bool) -> None:
        descriptor, path = tempfile.mkstemp()
        os.unlink(path)
        self._file = descriptor
        self._wait = wait
        self._lines: list[bytes] = []
        self._waiting: list[asyncio.Future[None]] = []
        self._some = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    async def append(self, line: bytes) -> None:
        """Keeps a line; returns when it is on the disk, if this journal waits for that."""
        self._lines.append(line)
        if self._wait:
            future = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            self._some.set()
            await future

    def _run(self) -> None:
        while True:
            self._some.wait(None if self._wait else COMMIT_SECONDS)
            self._some.clear()
            waiting, self._waiting = self._waiting, []
            lines, self._lines = self._lines, []
            if lines:
                os.write(self._file, b"\n".join(lines))
                os.fdatasync(self._file)
            if waiting:
                waiting[0].get_loop().call_soon_threadsafe(_wake, waiting)


def _wake(waiting: list[asyncio.Future[None]]) -> None:
    for future in waiting:
        if not future.done():
            future.set_result(None)


class Floor:
    """The skeleton as ASGI middleware."""

    def __init__(self, app: ASGIApp, *, wait: bool) -> None:
        self.app = app
        self.journal = FileJournal(wait=wait)
        self.sessions: dict[bytes, Session] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Takes one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        value = next((value for name, value in scope["headers"] if name == HEADER), None)
        if value is None:
            await send(_UNPAID_START)
            await send({"type": "http.response.body", "body": _UNPAID})
            return
        session, seq = self._judge(value)

        async def send_paid(message: Message) -> None:
            if message["type"] == "http.response.start":
                await self.journal.append(b"%d %d" % (seq, session.charged))
                paid = b'{"success":true,"seq":"%d","charged":"%d"}' % (seq, session.charged)
                message["headers"].append((b"payment-response", base64.b64encode(paid)))
            await send(message)

        await self.app(scope, receive, send_paid)

    def _judge(self, value: bytes) -> tuple[Session, int]:
        payload = json.loads(base64.b64decode(value))["payload"]
        signed = base64.urlsafe_b64decode(payload["voucher"] + "=")
        session = self.sessions.get(signed[48:64])
        if session is None:
            claims = payload["token"].split(".")[1]
            token = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
            key = base64.urlsafe_b64decode(token["cnf"]["jwk"]["x"] + "=")
            session = self.sessions[signed[48:64]] = Session(key)
        bindings.crypto_sign_open(signed[112:] + signed[:112], session.key)
        session.best = max(session.best, int.from_bytes(signed[72:80], "big"))
        if session.charged + AMOUNT > session.best:
            raise RuntimeError("not covered")
        session.charged += AMOUNT
        return session, int.from_bytes(signed[64:72], "big")


def make(*, wait: bool) -> ASGIApp:
    """The app behind the skeleton; `wait` for the disk before answering, or not."""
    return Floor(handlers.bare(), wait=wait)

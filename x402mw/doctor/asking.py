"""The doctor's requests: bounded in time and bytes, and never redirected."""

import asyncio
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from x402mw.core.errors import Malformed, RemoteError
from x402mw.core.strict import loads_object

SECONDS_MAX = 10.0
BODY_BYTES_MAX = 64 * 1024
PROBLEM_PREFIX = "urn:x402mw:problem:"


class Unreachable(RemoteError):
    """No answer at all, or none in time."""

    code = "unreachable"


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, and when (seconds) it was asked for and there."""

    status: int
    headers: httpx.Headers
    body: bytes
    asked_at: float
    answered_at: float

    @property
    def content(self) -> dict[str, Any]:
        """The JSON object in the body; empty if there is none."""
        try:
            return loads_object(self.body)
        except Malformed:
            return {}

    @property
    def problem(self) -> str:
        """The code of a refusal of ours; empty if this is none."""
        content = self.content
        code = content.get("code")
        known = isinstance(code, str) and content.get("type") == f"{PROBLEM_PREFIX}{code}"
        return str(code) if known else ""

    @property
    def ahead(self) -> float | None:
        """By how many seconds its `Date` is ahead of our clock, as little as can be (0 if none)."""
        try:
            date = parsedate_to_datetime(self.headers.get("Date", "")).timestamp()
        except (ValueError, OverflowError):
            return None
        # A date has whole seconds, and may be that of any moment between question and answer.
        if date > self.answered_at:
            return date - self.answered_at
        return min(0.0, date + 1 - self.asked_at)


class Asker:
    """Asks for one thing after the other."""

    def __init__(self, http: httpx.AsyncClient, clock: Callable[[], float]) -> None:
        self._http = http
        self._clock = clock

    async def ask(self, method: str, url: str, *, content: bytes = b"", **headers: str) -> Answer:
        """Sends one request; raises `Unreachable`. A `_` in a header's name stands for `-`."""
        found = {"Accept": "*/*", "Accept-Encoding": "gzip", "User-Agent": "x402mw-doctor"}
        found |= {name.replace("_", "-"): value for name, value in headers.items()}
        asked_at = self._clock()
        try:
            async with (
                asyncio.timeout(SECONDS_MAX),
                self._http.stream(method, url, headers=found, content=content or None) as answer,
            ):
                raw = bytearray()
                async for chunk in answer.aiter_raw():
                    raw += chunk
                    if len(raw) > BODY_BYTES_MAX:
                        break
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError) as error:
            raise Unreachable(f"{type(error).__name__}: {error}".rstrip(": ")) from None
        body = _plain(bytes(raw), answer.headers.get("Content-Encoding", ""))
        return Answer(answer.status_code, answer.headers, body, asked_at, self._clock())


def _plain(raw: bytes, coding: str) -> bytes:
    """Undoes compression within bounds; what cannot be undone stays as it is."""
    if coding.lower() not in ("gzip", "x-gzip", "deflate"):
        return raw[:BODY_BYTES_MAX]
    try:
        return zlib.decompressobj(wbits=47).decompress(raw, BODY_BYTES_MAX)
    except zlib.error:
        return raw[:BODY_BYTES_MAX]

"""A stream of events over connections that break: no event is missed, none comes twice."""

import json
from collections.abc import AsyncIterator, Iterator
from itertools import islice
from typing import Any

import httpx
import pytest

from x402mw.core.errors import EscrowRefused, EscrowUnavailable
from x402mw_client import events_stream
from x402mw_client.escrow import AsyncEscrowClient, EscrowClient
from x402mw_client.webhooks import Event

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("kind", ["sync", "async"])]
HELLO = "retry: 2000\nid: 6.999\n\n"


def told(number: int) -> str:
    """One event as the escrow writes it."""
    body = {"id": str(number), "type": "paused", "escrow_id": None, "at": 1, "effective_at": 1}
    rest = {"amount": "0.00", "kind": "pause", "data": {}, "new": "word"}
    return f"id: {number}\nevent: paused\ndata: {json.dumps(body | rest)}\n\n"


class Breaking:
    """An escrow that says one text for each connection, and then breaks it."""

    def __init__(self, kind: str, *texts: str | httpx.Response) -> None:
        self.kind = kind
        self.texts = list(texts)
        self.asked: list[str | None] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        """Answers one connection."""
        assert request.headers["Accept"] == "text/event-stream"
        self.asked.append(request.headers.get("Last-Event-ID"))
        if not self.texts:
            raise httpx.ConnectError("away")
        text = self.texts.pop(0)
        if isinstance(text, httpx.Response):
            return text
        return httpx.Response(200, content=_later(text) if self.kind == "async" else _now(text))

    async def take(self, number: int, **named: Any) -> list[Event]:
        """So many events through a client of the kind."""
        url, transport = "http://127.0.0.1:1", httpx.MockTransport(self)
        if self.kind == "sync":
            with EscrowClient(url, "pf_live_x", client=httpx.Client(transport=transport)) as client:
                return list(islice(client.watch(**named), number))
        http = httpx.AsyncClient(transport=transport)
        found = []
        async with AsyncEscrowClient(url, "pf_live_x", client=http) as client:
            async for event in client.watch(**named):
                found.append(event)
                if len(found) == number:
                    break
        return found


def _now(text: str) -> Iterator[bytes]:
    yield text.encode()
    raise httpx.ReadError("broken")


async def _later(text: str) -> AsyncIterator[bytes]:
    yield text.encode()
    raise httpx.ReadError("broken")


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connects again at once, four times in vain at most."""
    monkeypatch.setattr(events_stream, "PAUSES_SECONDS", (0.0, 0.0, 0.0, 0.0))


async def test_it_goes_on_where_it_broke(kind: str) -> None:
    """E18: each connection asks for what comes after the last whole event."""
    half = told(9)[:30]
    escrow = Breaking(kind, HELLO, told(7) + half, told(8)[:-1], told(8) + told(9))
    assert [event.id for event in await escrow.take(3)] == ["7", "8", "9"]
    assert escrow.asked == [None, "6.999", "7", "7"]


async def test_it_gives_up_when_nothing_comes(kind: str) -> None:
    """Connections in vain are counted anew after each event, and in the end an error says so."""
    escrow = Breaking(kind, *[HELLO] * 3, told(7), *[":\n\n"] * 2)
    with pytest.raises(EscrowUnavailable):
        await escrow.take(2, since="5")
    assert escrow.asked == ["5", *["6.999"] * 3, *["7"] * 3]


async def test_quiet_connections_that_live_are_none_in_vain(kind: str) -> None:
    """What lived long enough for a second comment was healthy, however often that happens."""
    quiet = HELLO + ":\n\n" * 3
    escrow = Breaking(kind, *[quiet] * 9, told(7))
    assert [event.id for event in await escrow.take(1)] == ["7"]
    escrow = Breaking(kind, *[HELLO + ":\n\n"] * 9, told(7))
    with pytest.raises(EscrowUnavailable):
        await escrow.take(1)


async def test_what_is_no_event_is_not_believed(kind: str) -> None:
    """Garbage in the stream ends the connection, and is no event."""
    escrow = Breaking(kind, "data: {}\n\n", "data: <html>\n\n", httpx.Response(502), told(7))
    assert [event.id for event in await escrow.take(1)] == ["7"]


async def test_a_refusal_ends_it(kind: str) -> None:
    """A revoked key, or too many streams: repeating would not help."""
    problem = {"type": "urn:x402mw:problem:unauthorized", "code": "unauthorized", "detail": "no"}
    escrow = Breaking(kind, told(7), httpx.Response(401, json=problem))
    with pytest.raises(EscrowRefused):
        await escrow.take(2)

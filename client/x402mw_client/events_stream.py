"""One stream of the escrow's events, over as many connections as it takes."""

from typing import Any

from x402mw.core.errors import EscrowUnavailable
from x402mw_client.event_operations import check_event_id
from x402mw_client.operations import API, AnyEscrow, Operation, name_of
from x402mw_client.records import Answer
from x402mw_client.webhooks import Event, WebhookRefused, read_event

PAUSES_SECONDS = (0.0, 0.2, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 60.0, 60.0)
"""Before each connection that follows another which said nothing after its first words: a comment
comes at once, the next ones while it lives."""

SILENCE_SECONDS = 60.0
"""The escrow says something every 15 s; a connection that is silent for longer is dead."""


class EventStream:
    """What a stream has told so far, and where its next connection goes on.

    `problem` is what the last connection broke of.
    """

    def __init__(self, escrow: AnyEscrow | None, since: str | None) -> None:
        query: dict[str, Any] = {} if escrow is None else {"escrow_id": name_of(escrow)}
        self.operation = Operation(
            Answer, "GET", f"{API}/events", query=query, timeout_seconds=SILENCE_SECONDS
        )
        self.problem: Exception | None = None
        self._last = None if since is None else check_event_id(since)
        self._id: str | None = None
        self._data: list[str] = []
        self._attempts = 0
        self._comments = 0

    @property
    def headers(self) -> dict[str, str]:
        """What the next connection asks with."""
        accept = {"Accept": "text/event-stream"}
        return accept if self._last is None else {**accept, "Last-Event-ID": self._last}

    def pause(self) -> float:
        """The seconds to wait before the next connection; too many in vain are the end."""
        if self._attempts == len(PAUSES_SECONDS):
            kind = type(self.problem).__name__
            raise EscrowUnavailable(f"the stream of events breaks off again and again ({kind})")
        # What a broken connection left unfinished comes again.
        self._id, self._data, self._comments = None, [], 0
        self._attempts += 1
        return PAUSES_SECONDS[self._attempts - 1]

    def take(self, line: str) -> Event | None:
        """Takes in a line without its end; an empty one ends an event."""
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "id":
            self._id = value
        elif name == "data":
            self._data.append(value)
        elif line and not name:
            self._comments += 1
            # A quiet connection that lived for a while was no attempt in vain.
            self._attempts = 1 if self._comments > 1 else self._attempts
        return None if line else self._finish()

    def _finish(self) -> Event | None:
        self._last, data = self._id or self._last, "\n".join(self._data)
        self._id, self._data = None, []
        if not data:
            return None
        self._attempts = 1
        try:
            return read_event(data.encode())
        except WebhookRefused:
            raise EscrowUnavailable("the escrow's stream holds what is no event") from None

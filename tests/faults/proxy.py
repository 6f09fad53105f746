"""A relay between any two parties that does to their HTTP what bad networks and proxies do.

It serves several links at once, in a process of its own, and is told over a socket which faults to
make: a fault strikes one exchange of its link, the `nth` that its `match` fits. Requests are taken
in whole, answers pass through piece by piece.
"""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

REQUEST_KINDS = (
    "drop_request", "cut_request", "delay_request", "reorder", "duplicate", "replay_later",
    "strip_request", "alter_request", "garbage_instead",
)  # fmt: skip
ANSWER_KINDS = (
    "drop_answer", "cut_answer", "delay_answer", "strip_answer", "alter_answer", "garbage_after",
    "answer_twice",
)  # fmt: skip
KINDS = REQUEST_KINDS + ANSWER_KINDS
REORDER_SECONDS, REORDER_LOOKS = 0.005, 20


def _answer(status: str, body: bytes, *fields: str) -> bytes:
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *fields]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


GARBAGE = (
    _answer("200 OK", b"<h1>Welcome</h1>", "Content-Type: text/html"),
    _answer("200 OK", b"{}", "Content-Type: application/json"),
    _answer("402 Payment Required", b"pay", "Content-Type: text/plain"),
    _answer("404 Not Found", b"<h1>404</h1>", "Content-Type: text/html"),
    _answer("409 Conflict", b"{}", "Content-Type: application/json", "Retry-After: 1"),
    _answer("500 Internal Server Error", b"oops", "Content-Type: text/plain"),
    _answer("502 Bad Gateway", b"<h1>502</h1>", "Content-Type: text/html"),
    _answer("503 Service Unavailable", b"", "Retry-After: 1"),
    _answer("200 OK", b"\x1f\x8b\x08broken", "Content-Encoding: gzip"),
    b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nshort",
    b"\x00\xff\xfenonsense\r\n\r\n",
    b"",
)


@dataclass
class Fault:
    """One fault. `arg` is a number of bytes or milliseconds, or picks garbage; `name` a header."""

    link: str
    kind: str
    nth: int = 1
    arg: int = 0
    name: str = ""
    match: str = ""
    seen: int = 0
    fired: bool = False

    def strikes(self, first_line: str) -> bool:
        """Counts an exchange that fits; tells whether it is the one."""
        if self.fired or self.match not in first_line:
            return False
        self.seen += 1
        self.fired = self.seen == self.nth
        return self.fired


class Cut(Exception):
    """The connection to the client is to end now, after what was written to it."""


@dataclass
class Link:
    """One listening port, and where it leads: in turn to each of `targets`."""

    name: str
    port: int
    targets: list[int] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    exchanges: int = 0
    done: int = 0

    def target(self) -> int:
        """The next worker's port."""
        self.exchanges += 1
        return self.targets[self.exchanges % len(self.targets)]

    def pick(self, first_line: str) -> Fault | None:
        """The fault that strikes this exchange."""
        return next((fault for fault in self.faults if fault.strikes(first_line)), None)


class Relay:
    """All links of one lane."""

    def __init__(self, links: list[Link]) -> None:
        self.links = {link.name: link for link in links}
        self.writers: set[asyncio.StreamWriter] = set()
        self.tasks: set[asyncio.Task[None]] = set()

    async def serve(self, control: socket.socket) -> None:
        """Serves until the lane is gone."""
        for link in self.links.values():
            await asyncio.start_server(self._accept(link), "127.0.0.1", link.port)
        reader, writer = await asyncio.open_connection(sock=control)
        while line := await reader.readline():
            writer.write(json.dumps(self._obey(json.loads(line))).encode() + b"\n")
            await writer.drain()

    def _obey(self, order: dict[str, Any]) -> Any:
        """An order names a link's targets and faults; any order tells which faults have fired."""
        if order.get("reset"):
            for writer in self.writers:
                writer.transport.abort()
        fired = [[f.link, f.kind] for link in self.links.values() for f in link.faults if f.fired]
        for name, targets in order.get("targets", {}).items():
            self.links[name].targets = targets
        if "faults" in order:
            for link in self.links.values():
                link.faults = [Fault(**f) for f in order["faults"] if f["link"] == link.name]
        return fired

    def _accept(self, link: Link) -> Any:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.writers.add(writer)
            try:
                while await self._exchange(link, reader, writer):
                    link.done += 1
            except Cut:
                writer.close()
            except (OSError, EOFError, ValueError, asyncio.LimitOverrunError):
                writer.transport.abort()
            finally:
                writer.close()
                self.writers.discard(writer)

        return accept

    async def _exchange(
        self, link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        request = head + b"".join([piece async for piece in _body(reader, head)])
        first_line = head.partition(b"\r\n")[0].decode("latin-1")
        fault = link.pick(first_line)
        kind = fault.kind if fault else ""
        if fault and kind in REQUEST_KINDS:
            request = await self._spoil_request(link, fault, request, writer)
        await self._forward(link, fault if kind in ANSWER_KINDS else None, request, writer)
        if kind == "replay_later" and fault:
            self._behind(self._send_aside(link, request, fault.arg / 1000))
        return b"\r\nconnection: close" not in head.lower()

    async def _spoil_request(
        self, link: Link, fault: Fault, request: bytes, writer: asyncio.StreamWriter
    ) -> bytes:
        """What is to be sent instead of a request."""
        match fault.kind:
            case "drop_request":
                raise ConnectionAbortedError
            case "cut_request":
                await self._cut_request(link, request[: fault.arg])
            case "delay_request":
                await asyncio.sleep(fault.arg / 1000)
            case "reorder":
                await self._let_another_pass(link)
            case "duplicate":
                self._behind(self._send_aside(link, request, 0))
            case "strip_request":
                return _without(request, fault.name)
            case "alter_request":
                return _altered(request, fault.name, fault.arg)
            case "garbage_instead":
                await _write(writer, GARBAGE[fault.arg])
                raise Cut
        return request

    async def _cut_request(self, link: Link, part: bytes) -> None:
        _, upstream = await asyncio.open_connection("127.0.0.1", link.target())
        await _write(upstream, part)
        upstream.transport.abort()
        raise Cut

    async def _let_another_pass(self, link: Link) -> None:
        done = link.done
        for _ in range(REORDER_LOOKS):
            await asyncio.sleep(REORDER_SECONDS)
            if link.done != done:
                return

    def _behind(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _send_aside(self, link: Link, request: bytes, seconds: float) -> None:
        """Sends a request once more, on a connection of its own; nobody hears the answer."""
        await asyncio.sleep(seconds)
        with contextlib.suppress(OSError, EOFError, ValueError):
            reader, upstream = await asyncio.open_connection("127.0.0.1", link.target())
            await _write(upstream, request)
            head = await reader.readuntil(b"\r\n\r\n")
            async for _ in _body(reader, head, answer=True):
                pass
            upstream.close()

    async def _forward(
        self, link: Link, fault: Fault | None, request: bytes, writer: asyncio.StreamWriter
    ) -> None:
        reader, upstream = await asyncio.open_connection("127.0.0.1", link.target())
        try:
            await _write(upstream, request)
            head = await reader.readuntil(b"\r\n\r\n")
            body = _body(reader, head, answer=True, bare=request.startswith(b"HEAD"))
            await _pass_on(fault, head, body, writer)
        finally:
            upstream.transport.abort()


async def _pass_on(
    fault: Fault | None, head: bytes, body: AsyncIterator[bytes], writer: asyncio.StreamWriter
) -> None:
    """Passes an answer on, spoiled by a fault or whole."""
    match fault:
        case Fault(kind="delay_answer"):
            await asyncio.sleep(fault.arg / 1000)
        case Fault(kind="drop_answer" | "garbage_after"):
            async for _ in body:
                pass
            await _write(writer, GARBAGE[fault.arg] if fault.kind == "garbage_after" else b"")
            raise Cut
        case Fault(kind="strip_answer"):
            head = _without(head, fault.name)
        case Fault(kind="alter_answer"):
            head = _altered(head, fault.name, fault.arg)
    await _write_pieces(fault, _with_head(head, body), writer)


async def _write_pieces(
    fault: Fault | None, pieces: AsyncIterator[bytes], writer: asyncio.StreamWriter
) -> None:
    """Writes an answer: to its end, up to a byte, or a second time."""
    kind, sent = fault.kind if fault else "", bytearray()
    async for piece in pieces:
        sent += piece
        if fault and kind == "cut_answer" and len(sent) >= fault.arg:
            await _write(writer, piece[: fault.arg - len(sent)])
            raise Cut
        await _write(writer, piece)
    if kind == "cut_answer":
        raise Cut
    if kind == "answer_twice":
        await _write(writer, bytes(sent))


async def _with_head(head: bytes, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield head
    async for piece in body:
        yield piece


async def _body(
    reader: asyncio.StreamReader, head: bytes, *, answer: bool = False, bare: bool = False
) -> AsyncIterator[bytes]:
    """The body behind a head, as raw bytes, piece by piece."""
    fields = dict(_fields(head))
    status = head.split(b" ", 2)[1] if answer else b""
    if bare or status in (b"204", b"304"):
        return
    if b"chunked" in fields.get(b"transfer-encoding", b""):
        size = -1
        while size:
            line = await reader.readuntil(b"\r\n")
            size = int(line.partition(b";")[0], 16)
            yield line + await reader.readexactly(size + 2)
    elif b"content-length" in fields:
        left = int(fields[b"content-length"])
        while left:
            piece = await reader.read(min(left, 65_536))
            if not piece:
                raise EOFError
            left -= len(piece)
            yield piece
    elif answer:
        while piece := await reader.read(65_536):
            yield piece
        raise Cut


def _fields(head: bytes) -> list[tuple[bytes, bytes]]:
    lines = head.split(b"\r\n")[1:]
    pairs = [line.partition(b":") for line in lines if line]
    return [(name.strip().lower(), value.strip().lower()) for name, _, value in pairs]


def _without(message: bytes, name: str) -> bytes:
    """A message without one header."""
    head, _, body = message.partition(b"\r\n\r\n")
    start = name.lower().encode() + b":"
    kept = [line for line in head.split(b"\r\n") if not line.lower().startswith(start)]
    return b"\r\n".join(kept) + b"\r\n\r\n" + body


def _altered(message: bytes, name: str, where: int) -> bytes:
    """A message with one character of one header changed."""
    head, _, body = message.partition(b"\r\n\r\n")
    start = name.lower().encode() + b":"
    lines = head.split(b"\r\n")
    for number, line in enumerate(lines):
        if line.lower().startswith(start) and len(line) > len(start) + 1:
            at = len(start) + 1 + where % (len(line) - len(start) - 1)
            other = b"A" if line[at : at + 1] != b"A" else b"B"
            lines[number] = line[:at] + other + line[at + 1 :]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


async def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()

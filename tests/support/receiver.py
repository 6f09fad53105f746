"""A receiver of webhooks on a real socket, which behaves as badly as it is told to."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from x402mw_client.webhooks import Event

ANSWERS = {
    "ok": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "fail": b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n",
    "junk": b"this is not HTTP\r\n\r\n",
    "endless": b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n" + b"x" * 4096,
}


@dataclass
class Delivery:
    """One request as it came."""

    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """Answers by `behave`: a word of `ANSWERS`, `hang`, `cut`, or `to <url>` for a redirect."""

    url: str = ""
    behave: Callable[[Delivery], str] = lambda _: "ok"
    got: list[Delivery] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    async def wait_for(self, count: int, seconds: float = 20) -> list[Delivery]:
        """Waits until so many requests came."""
        async with asyncio.timeout(seconds):
            while len(self.got) < count:  # noqa: ASYNC110 (what comes is from another program)
                await asyncio.sleep(0.01)
        return self.got

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Handles one connection."""
        with suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while await self._one(reader, writer):
                pass
        writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        delivery = Delivery(first.split()[1], headers, body)
        self.got.append(delivery)
        how = self.behave(delivery)
        if how == "hang":
            await asyncio.sleep(3600)
        if how == "cut":
            return False
        if how.startswith("to "):
            target = how[3:].encode()
            writer.write(b"HTTP/1.1 307 There\r\nLocation: " + target)
            writer.write(b"\r\nContent-Length: 0\r\n\r\n")
        else:
            writer.write(ANSWERS[how])
        await writer.drain()
        return how in ("ok", "fail")


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    """A receiver on a free port of this machine."""
    receiver, tasks = Receiver(), set[asyncio.Task[None]]()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(receiver.serve(reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    receiver.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook"
    try:
        yield receiver
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

"""A small TCP relay that loses answers on purpose.

It passes everything on, but once a 200 of the provider has come back it may abort the buyer's
connection instead of passing the answer on: the buyer then cannot know whether its call ran. Each
`lose_next()` loses one answer.
"""

import asyncio
import contextlib


class LossyRelay:
    """Relays `127.0.0.1:port` to a target port on this machine. Use as an async context manager."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._to_lose = 0
        self.lost = 0
        self.port = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> "LossyRelay":
        """Starts to listen on `port`."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def aclose(self) -> None:
        """Stops, and breaks what is still connected."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def __aenter__(self) -> "LossyRelay":
        return await self.open()

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def lose_next(self) -> None:
        """Loses the next 200."""
        self._to_lose += 1

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass_on(reader, up_writer))
                group.create_task(self._answer(up_reader, writer))
        except* (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            for one in (writer, up_writer):
                with contextlib.suppress(ConnectionError):
                    one.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(65_536):
            writer.write(chunk)
            await writer.drain()
        raise ConnectionResetError

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(65_536):
            if self._to_lose and chunk.startswith(b"HTTP/1.1 200"):
                self._to_lose -= 1
                self.lost += 1
                writer.transport.abort()
                raise ConnectionResetError
            writer.write(chunk)
            await writer.drain()
        raise ConnectionResetError

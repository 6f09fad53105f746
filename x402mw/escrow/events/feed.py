"""The live stream of events: read once for this process, handed to every stream they concern.

A stream that is new, or too slow for what is kept for it, reads the log by itself up to where the
feed is, and goes on from there: so none is missed and none comes twice.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator

from x402mw.escrow.errors import Refused
from x402mw.escrow.events.derive import REVOKED, Told
from x402mw.escrow.events.log import ENTRIES_AT_ONCE, find_head, read_events, read_events_of
from x402mw.escrow.events.news import Ear
from x402mw.escrow.ledger import Ledger

_log = logging.getLogger("x402mw.escrow")
STREAMS_PER_AGENT = 8
STREAMS_MAX = 2000
KEPT_MAX = 1000
KEEP_ALIVE_SECONDS = 15
RESTS, REST_SECONDS_MAX = 3, 0.1
"""After each look into the log for one stream, all of them rest so many times as long."""

Position = tuple[int, int]


class Reader:
    """One stream: what is kept for it until it is sent.

    `doubted` when a key of its agent was revoked, `ended` when it has to make room for another.
    All streams of an agent share a `turn`: one of them reads the log at a time.
    """

    def __init__(self, agent_id: str, escrow_id: str | None, turn: asyncio.Lock) -> None:
        self.turn = turn
        self.agent_id = agent_id
        self.escrow_id = escrow_id
        self.kept: deque[Told] = deque()
        self.behind = True
        self.doubted = False
        self.ended = False
        self.ear = Ear()

    def wants(self, told: Told) -> bool:
        """Tells whether an event is for this stream."""
        return self.agent_id in told.parties and self.escrow_id in (None, told.escrow_id)

    def keep(self, told: Told) -> None:
        """Keeps an event, unless there are too many: then the log has them."""
        if told.name == REVOKED and not told.escrow_id:
            self.doubted = True
            self.ear.wake()
        if not self.behind and self.wants(told):
            self.kept.append(told)
            if len(self.kept) > KEPT_MAX:
                self.kept.clear()
                self.behind = True
            self.ear.wake()


class Feed:
    """Reads the log for all streams of this process."""

    def __init__(self, ledger: Ledger) -> None:
        self.ended = False
        self._ledger = ledger
        self._at = 0
        self._readers: dict[str, list[Reader]] = {}
        self._count = 0
        self._ear: Ear | None = None
        self._log_turn = asyncio.Lock()
        # Set while the feed follows the log: not when nobody listens.
        self._live = asyncio.Event()

    async def run(self) -> None:
        """Reads as long as anybody listens, until cancelled."""
        with self._ledger.news.listen() as ear:
            self._ear = ear
            while True:
                try:
                    moved = await self._read()
                except Exception as error:
                    name = type(error).__name__
                    _log.warning("streams wait: %s", name, extra={"event": "streams_failed"})
                    moved = False
                if not moved:
                    await ear.wait()

    async def _read(self) -> bool:
        """Hands out the next events; tells whether there were any entries."""
        if not self._readers:
            self._live.clear()
            return False
        if not self._live.is_set():
            self._at = await self.head()
            self._live.set()
        read = await self._ledger.read(lambda db: read_events(db, self._at))
        for told in read.events:
            for agent_id in told.parties:
                for reader in self._readers.get(agent_id, ()):
                    reader.keep(told)
        moved, self._at = read.upto > self._at, read.upto
        return moved

    def enter(self, agent_id: str, escrow_id: str | None) -> Reader:
        """A place for a new stream, or a refusal; whoever takes it leaves it."""
        self._make_room(agent_id)
        mine = self._readers.setdefault(agent_id, [])
        reader = Reader(agent_id, escrow_id, mine[0].turn if mine else asyncio.Lock())
        mine.append(reader)
        self._count += 1
        if self._ear is not None:
            self._ear.wake()
        return reader

    def leave(self, reader: Reader) -> None:
        """Gives the place of a stream back; again is harmless."""
        mine = self._readers.get(reader.agent_id, [])
        if reader in mine:
            mine.remove(reader)
            self._count -= 1
        if not mine:
            self._readers.pop(reader.agent_id, None)

    def _make_room(self, agent_id: str) -> None:
        """Refuses one stream too many; when all are taken, who has most of them gives one."""
        mine = len(self._readers.get(agent_id, ()))
        if mine >= STREAMS_PER_AGENT:
            detail = f"an agent has at most {STREAMS_PER_AGENT} streams of events"
            raise Refused(429, "too_many_streams", detail)
        if self._count < STREAMS_MAX:
            return
        most = max(self._readers.values(), key=len)
        if len(most) <= mine + 1:
            detail = f"this service has at most {STREAMS_MAX} streams of events; try again later"
            raise Refused(429, "too_many_streams", detail)
        newest = most[-1]
        newest.ended = True
        newest.ear.wake()
        self.leave(newest)

    async def follow(self, reader: Reader, since: Position) -> AsyncIterator[Told | None]:
        """Events after a position, for ever; None when nothing happened for a while."""
        position = since
        while not self._is_over(reader):
            if reader.behind:
                async for old in self._catch_up(reader, position):
                    position = position if old is None else (old.seq, old.part)
                    yield old
            quiet = not reader.kept
            while reader.kept and not reader.ended:
                told = reader.kept.popleft()
                if (told.seq, told.part) > position:
                    position = told.seq, told.part
                    yield told
            if quiet and not reader.behind:
                yield None
            if not (reader.behind or reader.kept or self._is_over(reader)):
                await reader.ear.wait(KEEP_ALIVE_SECONDS)

    def _is_over(self, reader: Reader) -> bool:
        return self.ended or reader.ended

    async def head(self) -> int:
        """The number of the newest entry."""
        return await self._ledger.read(find_head)

    async def _catch_up(self, reader: Reader, position: Position) -> AsyncIterator[Told | None]:
        """What the log has after a position, None for a part of it with nothing for this stream.

        From then on the feed keeps events.
        """
        await self._live.wait()
        reader.kept.clear()
        reader.behind = False
        upto, target = position[0] - 1, self._at
        while upto < target and not self._is_over(reader):
            end = min(upto + ENTRIES_AT_ONCE, target)
            found = await self._read_for(reader, upto, end)
            mine = [told for told in found if (told.seq, told.part) > position]
            for told in mine:
                yield told
            if not mine:
                yield None
            upto = end

    async def _read_for(self, reader: Reader, since: int, upto: int) -> list[Told]:
        """A part of the log for one stream, when it is its turn: one of each agent, one of all."""
        agent_id, escrow_id = reader.agent_id, reader.escrow_id
        clock = asyncio.get_running_loop()
        async with reader.turn, self._log_turn:
            began = clock.time()
            found = await self._ledger.read(
                lambda db: read_events_of(db, agent_id, escrow_id, since, upto)
            )
            # However many read from the beginning, most of the time is everybody else's.
            await asyncio.sleep(min(RESTS * (clock.time() - began), REST_SECONDS_MAX))
        return found

    def close(self) -> None:
        """Ends all streams."""
        self.ended = True
        self._live.set()
        for readers in self._readers.values():
            for reader in readers:
                reader.ear.wake()

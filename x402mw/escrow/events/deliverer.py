"""The task that delivers webhooks: fills the queue from the log, sends what is due, notes the end.

One process at a time does this, by a lease. Deliveries run beside each other, few of each agent, so
that none takes the places of the others. What they came to is noted together, so that many cost one
commit; a round that has nothing to write only reads.
"""

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from collections import Counter
from typing import Any

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.escrow.events import queue
from x402mw.escrow.events.derive import write_id
from x402mw.escrow.events.news import POLL_SECONDS, Ear
from x402mw.escrow.events.posting import Outcome, Poster
from x402mw.escrow.events.queue import Done
from x402mw.escrow.events.turns import Due, Key, Load, key_of
from x402mw.escrow.ledger import Ledger

PRUNE_SECONDS = 3600
GATHER_SECONDS = 0.02
_log = logging.getLogger("x402mw.escrow")


class Deliverer:
    """Delivers the webhooks of one ledger, while it holds the lease."""

    def __init__(self, ledger: Ledger, poster: Poster) -> None:
        self._ledger = ledger
        self._poster = poster
        self._name = secrets.token_hex(8)
        # What is on its way or not yet noted, with its agent.
        self._running: dict[Key, tuple[str, asyncio.Task[None]]] = {}
        # Webhooks of which all that is due is on its way.
        self._told: set[str] = set()
        self._done: list[Done] = []
        self._cursor = 0
        self._held_since = -queue.RENEW_SECONDS
        self._not_before = 0.0
        self._pruned = 0

    async def run(self) -> None:
        """Delivers until cancelled; what was on its way then is sent again later."""
        with self._ledger.news.listen() as ear:
            try:
                while True:
                    try:
                        more = await self._step(ear)
                    except Exception:
                        _log.exception("webhooks wait", extra={"event": "webhooks_failed"})
                        more = False
                    if not more:
                        await ear.wait()
                        await self._gather()
            finally:
                await self._stop()

    async def _gather(self) -> None:
        """Lets commits that follow each other closely be looked at together."""
        if not self._done:
            await asyncio.sleep(GATHER_SECONDS)

    async def _step(self, ear: Ear) -> bool:
        """One round, which writes only if it must; tells whether the next one follows at once."""
        now = self._ledger.now()
        agents = Counter(agent_id for agent_id, _ in self._running.values())
        load = Load(agents, self._running.keys(), self._told)
        look = await self._ledger.read(lambda db: queue.look(db, self._cursor, now, load))
        self._cursor = look.cursor
        held = 0 <= now - self._held_since < queue.RENEW_SECONDS
        if self._done or look.wanted or look.far or (not held and (look.due.rows or self._running)):
            return await self._take_turn(now)
        self._start(look.due, ear)
        return look.more

    async def _take_turn(self, now: int) -> bool:
        """Writes what is to be written; tells whether this process may."""
        if time.monotonic() < self._not_before:
            return False
        done = list(self._done)
        made = await self._ledger.write_aside(lambda db: self._write(db, done, now))
        if made is None:
            # Another process delivers, and sends again what was on its way here.
            self._held_since = -queue.RENEW_SECONDS
            self._not_before = time.monotonic() + POLL_SECONDS
        else:
            self._held_since = now
            self._cursor, due = made
            self._told -= due
        del self._done[: len(done)]
        for noted in done:
            self._running.pop(key_of(noted.row), None)
            self._told.discard(noted.row.webhook_id)
        return made is not None

    async def _write(
        self, connection: AsyncConnection, done: list[Done], now: int
    ) -> tuple[int, set[str]] | None:
        """Up to where deliveries are made, and whose; None if it is another process's turn."""
        if not await queue.hold(connection, self._name, now):
            return None
        await queue.settle(connection, done, now)
        made = await queue.fill(connection, self._cursor, now)
        if now - self._pruned >= PRUNE_SECONDS:
            await queue.prune(connection, now)
            self._pruned = now
        return made

    def _start(self, due: Due, ear: Ear) -> None:
        """Sends what is due; then the 10 seconds of each begin."""
        for row in due.rows:
            self._running[key_of(row)] = row.agent_id, asyncio.create_task(self._deliver(row, ear))
        # Only what ends later has them looked at again.
        self._told |= due.hooks & {webhook_id for webhook_id, _, _ in self._running}

    async def _deliver(self, row: Row[Any], ear: Ear) -> None:
        headers = self._sign(row)
        try:
            outcome = await self._poster.post(row.url, headers, row.body.encode())
        except Exception as error:
            name = type(error).__name__
            _log.exception("a webhook failed here", extra={"event": "webhooks_failed"})
            outcome = Outcome(delivered=False, text=f"failed here: {name}")
        self._done.append(Done(row, outcome))
        ear.wake()

    def _sign(self, row: Row[Any]) -> dict[str, str]:
        now, event_id = self._ledger.now(), write_id(row.seq, row.part)
        text = f"{now}.{event_id}.{row.body}".encode()
        generations = [row.generation]
        if row.old_until is not None and now < row.old_until:
            generations.append(row.generation - 1)
        signer = self._ledger.signer
        signatures = [
            hmac.new(
                signer.webhook_secret(row.webhook_id, each).encode(), text, hashlib.sha256
            ).hexdigest()
            for each in generations
        ]
        return {
            "Content-Type": "application/json",
            "User-Agent": "x402mw-webhooks",
            "X402MW-Timestamp": str(now),
            "X402MW-Event-Id": event_id,
            "X402MW-Signature": ",".join(f"v1={each}" for each in signatures),
        }

    async def _stop(self) -> None:
        tasks = [task for _, task in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._poster.close()
        await self._ledger.write_aside(self._let_go)

    async def _let_go(self, connection: AsyncConnection) -> None:
        now = self._ledger.now()
        if await queue.hold(connection, self._name, now):
            await queue.settle(connection, self._done, now)
            await queue.let_go(connection, self._name)

"""The task that delivers webhooks: fills the queue from the log, sends what is due, notes the end.

One process at a time does this, by a lease. Deliveries run beside each other; what they came to is
noted together, so that many cost one commit.
"""

import asyncio
import hashlib
import hmac
import logging
import secrets
from typing import Any

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.escrow.events import queue
from x402mw.escrow.events.derive import write_id
from x402mw.escrow.events.news import Ear
from x402mw.escrow.events.posting import Outcome, Poster
from x402mw.escrow.events.queue import Done
from x402mw.escrow.ledger import Ledger

PRUNE_SECONDS = 3600
GATHER_SECONDS = 0.02
_log = logging.getLogger("x402mw.escrow")
_Key = tuple[str, int, int]


class Deliverer:
    """Delivers the webhooks of one ledger, while it holds the lease."""

    def __init__(self, ledger: Ledger, poster: Poster) -> None:
        self._ledger = ledger
        self._poster = poster
        self._name = secrets.token_hex(8)
        self._running: dict[_Key, asyncio.Task[None]] = {}
        self._done: list[Done] = []
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
        if not (self._done or self._running):
            await asyncio.sleep(GATHER_SECONDS)

    async def _step(self, ear: Ear) -> bool:
        """One round; tells whether the log goes on at once."""
        now = self._ledger.now()
        idle = not (self._done or self._running)
        if idle and not await self._ledger.read(lambda db: queue.has_work(db, now)):
            return False
        done, self._done, found = self._done, [], None
        try:
            found = await self._ledger.write_aside(lambda db: self._turn(db, done, now))
        finally:
            if found is None:
                self._done = done + self._done
        if found is None:
            return False
        more, due = found
        for noted in done:
            self._running.pop(_key(noted.row), None)
        for row in due:
            if _key(row) not in self._running:
                self._running[_key(row)] = asyncio.create_task(self._deliver(row, ear))
        return more

    async def _turn(
        self, connection: AsyncConnection, done: list[Done], now: int
    ) -> tuple[bool, list[Row[Any]]] | None:
        """Whether the log goes on, and what is due; None if it is another process's turn."""
        if not await queue.hold(connection, self._name, now):
            return None
        await queue.settle(connection, done, now)
        more = await queue.fill(connection, now)
        due = await queue.find_due(connection, now)
        if now - self._pruned >= PRUNE_SECONDS:
            await queue.prune(connection, now)
            self._pruned = now
        return more, due

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
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        await self._poster.close()
        await self._ledger.write_aside(self._let_go)

    async def _let_go(self, connection: AsyncConnection) -> None:
        await queue.settle(connection, self._done, self._ledger.now())
        await queue.let_go(connection, self._name)


def _key(row: Row[Any]) -> _Key:
    return row.webhook_id, row.seq, row.part

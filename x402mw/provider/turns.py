"""Keeps the event loop answering while very many payments arrive together.

To judge a payment is a tenth of a millisecond of plain computing. Of a thousand that come at once
all would be judged in one turn of the loop, and nothing else would happen meanwhile.
"""

import asyncio
from collections import deque

JUDGED_PER_TURN = 64


class Turns:
    """Lets so many calls through in each turn of the event loop; the others wait, first come first.

    A turn is what the loop runs before it looks at its sockets and timers again.
    """

    def __init__(self, per_turn: int = JUDGED_PER_TURN) -> None:
        self._per_turn = self._left = per_turn
        self._renewing = False
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self) -> None:
        """Returns at once, or in a later turn if this one has had its share."""
        loop = asyncio.get_running_loop()
        if not self._renewing:
            self._renewing = True
            loop.call_soon(self._renew, loop)
        if self._left:
            self._left -= 1
            return
        waiter = loop.create_future()
        self._waiting.append(waiter)
        await waiter

    def _renew(self, loop: asyncio.AbstractEventLoop) -> None:
        self._left = self._per_turn
        while self._left and self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                self._left -= 1
        # Whom we woke runs in the coming turn, and counts in it.
        self._renewing = self._left < self._per_turn
        if self._renewing:
            loop.call_soon(self._renew, loop)

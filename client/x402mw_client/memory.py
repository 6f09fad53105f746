"""Where a wallet keeps what it remembers: here in RAM only; `walletfile` does the same in a file.

The memory is the truth, and the objects of `sessions` are a cache of it. Every change is one
transaction; what other processes changed in the file meanwhile is news that is taken up first.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from x402mw.core.amounts import Atomic
from x402mw_client.sessions import Call, Opening, Past, Session

Row = tuple[Any, ...]
_NOTHING = nullcontext()


class Busy(Exception):
    """Another process is changing the wallet file right now: nothing was done, try again."""


@dataclass(frozen=True, slots=True)
class News:
    """What others changed: rows of sessions (`walletfile.COLUMNS`), all openings, and the past.

    `everything`: sessions without a row are no more.
    """

    sessions: list[Row]
    openings: list[Row]
    past: Past
    everything: bool


class Memory:
    """A wallet's memory in RAM: one process has it all, so there is never any news."""

    path: str | os.PathLike[str] | None = None

    def __init__(self) -> None:
        """Remembers nothing yet."""
        self.settings: dict[str, str] = {}
        self._held: dict[tuple[bytes, int], Atomic] = {}

    @property
    def shared(self) -> bool:
        """Whether other processes may change it."""
        return self.path is not None

    def close(self) -> None:
        """Ends; a file then belongs to the other processes."""

    # Changing. Only inside a transaction.

    def transaction(self, *, durable: bool = False) -> AbstractContextManager[None]:
        """All or nothing; `durable` also over a power cut. May raise `Busy` or `sqlite3.Error`."""
        return _NOTHING

    def set(self, name: str, value: str) -> None:
        """Remembers a setting."""
        self.settings[name] = value

    def begin(self, opening: Opening) -> None:
        """Writes an opening before it is sent."""

    def abandon(self, opening: Opening) -> None:
        """Forgets an opening that came to nothing."""

    def add(self, session: Session) -> None:
        """Writes a new session."""

    def save(self, session: Session) -> None:
        """Writes a session as it stands now."""

    def fold(self, session: Session, past: Past) -> None:
        """Forgets a session that is over; `past` is the sum of all such sessions."""

    def hold(self, call: Call, amount: Atomic, expires: int, *, new: bool) -> bool:
        """Writes what a call holds; tells whether it is still there, unless it is `new`."""
        key = call.session.id, call.seq
        if not new and key not in self._held:
            return False
        self._held[key] = amount
        return True

    def drop(self, call: Call) -> Atomic | None:
        """Forgets a call and returns what it held; None if it was gone already."""
        return self._held.pop((call.session.id, call.seq), None)

    def drop_all(self, session: Session) -> None:
        """Forgets all calls of a session."""
        for key in [key for key in self._held if key[0] == session.id]:
            del self._held[key]

    def leave(self, call: Call) -> None:
        """Notes that nobody waits for a call any more: any process may ask about it."""

    # What other processes did.

    def news(self) -> News | None:
        """What changed since the last look; also outside of a transaction."""
        return None

    def recover(self) -> None:
        """Takes over the calls of processes that died: nobody waits for those now."""

    def doubts(self) -> Iterator[tuple[bytes, int, str, Atomic, int]]:
        """The calls that nobody waits for: session, seq, url, hold, expires."""
        return iter(())

    def busy_elsewhere(self, session: Session) -> bool:
        """Whether another process has a call on its way in this session."""
        return False

    def leave_to_others(self) -> bool:
        """Notes that this process is about to end; whether others still use the wallet."""
        return False

    def come_back(self) -> None:
        """Notes that this process goes on after all."""

    def enter(self, name: object) -> bool:
        """Enters a section that only one process is in at a time, or tells that another is."""
        return True

    def exit(self, name: object) -> None:
        """Leaves a section."""

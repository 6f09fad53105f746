"""What all sessions of a wallet may come to, without adding them all up for every call."""

from collections.abc import Mapping

from x402mw_client.sessions import LAST_SECONDS, Session, State


class WorstSum:
    """The sum of `Session.at_worst`, brought up to date for the sessions that have changed.

    It also changes with the clock alone, when a session takes no more calls; then, and when the
    clock was set back, all are added up again.
    """

    def __init__(self) -> None:
        self._each: dict[bytes, int] = {}
        self._sum = 0
        self._changed: dict[bytes, Session] = {}
        self._now = self._until = 0.0

    def changed(self, session: Session) -> None:
        """Notes that something about a session is new, or that it is new itself."""
        self._changed[session.id] = session

    def gone(self, session: Session) -> None:
        """Leaves a session out from now on."""
        self._changed.pop(session.id, None)
        self._sum -= self._each.pop(session.id, 0)

    def at(self, now: float, sessions: Mapping[bytes, Session]) -> int:
        """What `sessions` may come to; `now` in seconds."""
        if not self._now <= now < self._until:
            self._each, self._sum, self._until = {}, 0, float("inf")
            self._changed = dict(sessions)
        self._now = now
        while self._changed:
            name, session = self._changed.popitem()
            if name not in sessions:
                continue  # A story may go on with one that is gone.
            worst = session.at_worst(now)
            self._sum += worst - self._each.get(name, 0)
            self._each[name] = worst
            last = session.expires_at - LAST_SECONDS
            if session.state is State.OPEN and now < last < self._until:
                self._until = last
        return self._sum

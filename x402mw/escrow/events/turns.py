"""Whose turn it is: what is sent next, found without reading what else waits.

A webhook says when something of it is due at the earliest. After a delivery it goes behind all that
are due already, so a round reads as much as it has room for, however many rows wait.
"""

from collections import Counter
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

from sqlalchemy import BigInteger, Row, bindparam, select
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.escrow import schema

AT_ONCE_PER_AGENT = 4
AT_ONCE = 256
Key = tuple[str, int, int]
_HOOKS, _SENT = schema.webhooks, schema.deliveries
_NOW = bindparam("now", type_=BigInteger)
# Made once: to build a statement costs more than to run it.
_DUE_HOOKS = (
    select(_HOOKS.c.webhook_id, _HOOKS.c.agent_id)
    .where(
        _HOOKS.c.next_at <= _NOW,
        _HOOKS.c.agent_id.not_in(bindparam("agents", expanding=True)),
        _HOOKS.c.webhook_id.not_in(bindparam("hooks", expanding=True)),
    )
    .order_by(_HOOKS.c.next_at)
    .limit(bindparam("most"))
)
# Of one webhook no more than these are on their way, so one more is among them if there is one.
_LINE = (
    select(_SENT, _HOOKS.c.agent_id, _HOOKS.c.url, _HOOKS.c.generation, _HOOKS.c.old_until)
    .join(_HOOKS, _HOOKS.c.webhook_id == _SENT.c.webhook_id)
    .where(_SENT.c.webhook_id == bindparam("hook"), _SENT.c.next_at <= _NOW)
    .order_by(_SENT.c.next_at, _SENT.c.seq, _SENT.c.part)
    .limit(AT_ONCE_PER_AGENT)
)


class Load(NamedTuple):
    """What is on its way: how many of each agent, which, and webhooks with nothing else due."""

    agents: Counter[str]
    keys: AbstractSet[Key]
    hooks: AbstractSet[str]


class Due(NamedTuple):
    """What to send, and webhooks of which then all that is due is on its way."""

    rows: list[Row[Any]]
    hooks: set[str]


def key_of(row: Row[Any]) -> Key:
    """Which delivery this is."""
    return row.webhook_id, row.seq, row.part


async def find_due(connection: AsyncConnection, now: int, load: Load) -> Due:
    """What is sent now: each agent's first before anybody's second, of its webhooks in turn."""
    round_ = _Round(connection, now, load)
    for turn in range(AT_ONCE_PER_AGENT):
        while round_.room and await round_.take(turn):
            pass
        if not round_.passed_over(turn):
            break
    return Due(round_.found, round_.told - load.hooks)


class _Round:
    """One look at who is due."""

    def __init__(self, connection: AsyncConnection, now: int, load: Load) -> None:
        self.found: list[Row[Any]] = []
        self.told = set(load.hooks)
        self._connection, self._now, self._keys = connection, now, load.keys
        self._agents = Counter(load.agents)
        self._of_hook = Counter(webhook_id for webhook_id, _, _ in load.keys)
        self._lines: dict[str, list[Row[Any]]] = {}

    @property
    def room(self) -> int:
        """How many more may be on their way."""
        return AT_ONCE - self._agents.total()

    def passed_over(self, turn: int) -> list[str]:
        """The agents that had this turn."""
        return [agent_id for agent_id, count in self._agents.items() if count > turn]

    async def take(self, turn: int) -> bool:
        """Takes one of each agent that has not had this turn; tells whether any was due."""
        agents, hooks = self.passed_over(turn), list(self.told)
        which = {"now": self._now, "most": AT_ONCE, "agents": agents, "hooks": hooks}
        due = (await self._connection.execute(_DUE_HOOKS, which)).all()
        for name, agent_id in sorted(due, key=lambda hook: self._of_hook[hook.webhook_id]):
            if self.room and self._agents[agent_id] <= turn:
                await self._take_of(name, agent_id)
        return bool(due)

    async def _take_of(self, name: str, agent_id: str) -> None:
        if name not in self._lines:
            rows = await self._connection.execute(_LINE, {"hook": name, "now": self._now})
            self._lines[name] = [row for row in rows if key_of(row) not in self._keys]
        line = self._lines[name]
        if line:
            self.found.append(line.pop(0))
            self._of_hook[name] += 1
            self._agents[agent_id] += 1
        if not line:
            self.told.add(name)

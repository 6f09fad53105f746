"""A worker's connections to PostgreSQL: bounded in all they wait for, and never two of a kind.

Nothing here outlives a fork: a child that kept the socket would keep its parent's locks alive.
"""

import asyncio
import contextlib
import hashlib
import os
import re
import secrets
import weakref
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg  # type: ignore[import-untyped]  # it has no stubs

from x402mw.core.errors import ConfigurationError
from x402mw.provider.journal.store import Durability

CONNECT_SECONDS = 3.0
COMMAND_SECONDS = 6.0
LOCK_MS = 2000
"""How long a batch waits for its turn before it fails."""
STOPPED_MS = 5000
"""How long a worker may stop in the middle of a batch before the server takes the batch back."""
KEEPALIVE = {
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}
"""In seconds and tries: a host that is gone is given up after 25 s."""
SCHEMA_DEFAULT = "x402mw_journal"
SCHEMA_NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")
SYNCHRONOUS = {"fsync": "on", "process": "off"}


def schema_of(url: str) -> str:
    """The PostgreSQL schema that holds the journal: `search_path` in the URL, or our own."""
    (name, *rest) = parse_qs(urlsplit(url).query).get("search_path", [SCHEMA_DEFAULT])
    if rest or not SCHEMA_NAME.fullmatch(name):
        raise ConfigurationError("search_path must name one schema, in small letters")
    return name


class Line:
    """One connection that can be made again. `kind` tells it from the worker's other one."""

    def __init__(self, url: str, durability: Durability, kind: str) -> None:
        self._url = url
        # A name that nobody else has: by it our own former connection is found, and ended.
        self._name = f"x402mw-journal-{kind}-{secrets.token_hex(8)}"
        self._settings = {
            **KEEPALIVE,
            "application_name": self._name,
            "search_path": schema_of(url),
            "lock_timeout": str(LOCK_MS),
            "idle_in_transaction_session_timeout": str(STOPPED_MS),
            "synchronous_commit": SYNCHRONOUS[durability],
        }
        self._connection: Any = None
        _lines.add(self)

    @property
    def up(self) -> bool:
        """Whether it is connected, as far as is known."""
        return self._connection is not None and not self._connection.is_closed()

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open on it."""
        return self.up and bool(self._connection.is_in_transaction())

    async def connect(self) -> None:
        """Connects; what is left of the connection before, on the server, is ended first."""
        self.drop()
        self._connection = await asyncpg.connect(
            self._url,
            timeout=CONNECT_SECONDS,
            command_timeout=COMMAND_SECONDS,
            server_settings=self._settings,
        )
        await self.fetch(
            "SELECT pg_terminate_backend(pid, 2000) FROM pg_stat_activity"
            " WHERE application_name = $1 AND pid <> pg_backend_pid()",
            self._name,
        )

    async def fetch(self, statement: str, *values: Any, seconds: float | None = None) -> list[Any]:
        """Runs one statement, in a time of its own if it needs one, and returns its rows."""
        found: list[Any] = await self._connection.fetch(statement, *values, timeout=seconds)
        return found

    async def execute(self, statements: str) -> None:
        """Runs statements that have no values and no rows."""
        await self._connection.execute(statements)

    async def execute_many(self, statement: str, values: Any) -> None:
        """Runs one statement for each row of values, in one round trip."""
        await self._connection.executemany(statement, values)

    async def close(self) -> None:
        """Says goodbye."""
        if self.up:
            with contextlib.suppress(OSError, asyncio.TimeoutError, asyncpg.PostgresError):
                await self._connection.close(timeout=1)
        self.drop()

    def drop(self) -> None:
        """Ends it without a word."""
        connection, self._connection = self._connection, None
        if connection is not None and not connection.is_closed():
            connection.terminate()

    def close_inherited(self) -> None:
        """Gives up a forked child's share of the socket."""
        connection, self._connection = self._connection, None
        if connection is not None and not connection.is_closed():
            # asyncpg has no other way to its socket.
            socket = connection._transport.get_extra_info("socket")  # noqa: SLF001
            with contextlib.suppress(OSError):
                os.close(socket.fileno())


_lines: weakref.WeakSet[Line] = weakref.WeakSet()


def _close_inherited() -> None:
    for line in list(_lines):
        line.close_inherited()


os.register_at_fork(after_in_child=_close_inherited)


class Locks:
    """The advisory locks of one journal, held by a line: numbers that fall with the connection."""

    def __init__(self, line: Line, schema: str) -> None:
        self._line = line
        name = hashlib.sha256(f"x402mw journal {schema}".encode()).digest()
        self._journal = int.from_bytes(name[:4], signed=True)

    async def take(self, number: int, seconds: float) -> None:
        """Takes one, waiting so many seconds."""
        await self._line.execute(f"SET lock_timeout = {int(seconds * 1000)}")
        statement = "SELECT pg_advisory_lock($1, $2)"
        await self._line.fetch(statement, self._journal, number, seconds=seconds + 1)
        await self._line.execute(f"SET lock_timeout = {LOCK_MS}")

    async def try_take(self, number: int) -> bool:
        """Takes one if it is free."""
        statement = "SELECT pg_try_advisory_lock($1, $2)"
        ((taken,),) = await self._line.fetch(statement, self._journal, number)
        return bool(taken)

    async def give(self, number: int) -> None:
        """Gives one up."""
        await self._line.fetch("SELECT pg_advisory_unlock($1, $2)", self._journal, number)

    async def held(self) -> set[int]:
        """The numbers that anybody holds."""
        found = await self._line.fetch(
            "SELECT objid::bigint FROM pg_locks JOIN pg_database d ON d.oid = database"
            " WHERE locktype = 'advisory' AND granted AND objsubid = 2"
            " AND classid::bigint = $1 AND d.datname = current_database()",
            self._journal % 2**32,
        )
        return {number for (number,) in found}

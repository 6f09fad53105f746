"""The databases of a schedule: where they are, how they are copied, and what befalls them.

Two kinds with one face: `Files` (SQLite) and `Servers` (PostgreSQL, a server for each lane). They
are used by the lane, which forks, so nothing here leaves a connection or a thread behind.
"""

import asyncio
import shutil
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import asyncpg

from tests.support.postgresql import Server, start_server

JOURNAL_SCHEMA, ESCROW_SCHEMA = "x402mw_journal", "public"
Row = dict[str, Any]


def is_server(place: str) -> bool:
    """Whether a place names a database server, not a file."""
    return "://" in place


async def read(place: str, schema: str, *queries: str) -> list[list[Row]]:
    """Reads the rows of some queries from either kind of place."""
    if not is_server(place):
        connection = sqlite3.connect(place)
        connection.row_factory = sqlite3.Row
        try:
            return [[dict(row) for row in connection.execute(query)] for query in queries]
        finally:
            connection.close()
    server = await asyncpg.connect(place, server_settings={"search_path": schema})
    try:
        return [[dict(row) for row in await server.fetch(query)] for query in queries]
    finally:
        await server.close()


def read_now(place: str, schema: str, query: str) -> list[Row]:
    """The same for one query, where no event loop may stay behind."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(read(place, schema, query))).result()[0]


class Files:
    """SQLite: a file for the escrow, one for the journal."""

    def __init__(self, folder: Path) -> None:
        self.template = str(folder / "template.db")

    def copy(self, folder: Path) -> tuple[str, str]:
        """A fresh escrow from the template, and a place for a new journal."""
        shutil.copy(self.template, folder / "escrow.db")
        return str(folder / "escrow.db"), str(folder / "journal.db")

    def drop(self, escrow_db: str) -> None:
        """Nothing to do: the folder goes."""

    def close(self) -> None:
        """Nothing to do."""

    def hold_lock(self, place: str, role: str, seconds: float) -> None:
        """Holds the lock that writers need. For a process of its own."""
        connection = sqlite3.connect(place, timeout=1, isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        time.sleep(seconds)


class Servers:
    """PostgreSQL: one server, and one database for escrow and journal of each schedule."""

    def __init__(self) -> None:
        self.server: Server = start_server(durable=False)
        # It may be killed, and must then have what it has acknowledged.
        self.server.execute("ALTER ROLE postgres SET synchronous_commit = on")
        self.template = self.server.new_database()

    def copy(self, folder: Path) -> tuple[str, str]:
        """A fresh escrow from the template; the journal makes a schema of its own beside it."""
        place = self.server.new_database(_name(self.template))
        return place, place

    def drop(self, escrow_db: str) -> None:
        """Drops the database of a schedule."""
        self.server.drop_database(escrow_db)

    def close(self) -> None:
        """Ends the server."""
        self.server.remove()

    def hold_lock(self, place: str, role: str, seconds: float) -> None:
        """Holds the row that writers lock first. For a process of its own."""
        table = f"{JOURNAL_SCHEMA}.totals" if role == "provider" else "service"

        async def hold() -> None:
            connection = await asyncpg.connect(place)
            async with connection.transaction():
                await connection.fetch(f"SELECT * FROM {table} FOR UPDATE")
                await asyncio.sleep(seconds)
            await connection.close()

        asyncio.run(hold())

    def cut(self, place: str) -> None:
        """Cuts all connections to a schedule's database."""
        self.server.drop_connections(place)

    def crash(self) -> None:
        """Kills the server in whatever it does, and starts it again."""
        self.server.kill()
        self.server.start()

    def restart(self) -> None:
        """Ends the server as its operator does, and starts it again."""
        self.server.restart()


def _name(url: str) -> str:
    return url.split("/")[3].partition("?")[0]


def open_databases(kind: str, folder: Path) -> Files | Servers:
    """The databases of a lane."""
    return Files(folder) if kind == "sqlite" else Servers()

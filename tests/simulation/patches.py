"""Makes the outside of the production code simulated for as long as one seed runs.

Randomness comes from the seed; the escrow's database driver works without a thread; what would
wait in a thread is done at once. Nothing that decides about money is touched.
"""

import asyncio
import logging
import os
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.base import SQLiteExecutionContext
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool
from sqlalchemy.util import LRUCache
from sqlalchemy.util.concurrency import greenlet_spawn

from tests.simulation.loop import HERE
from x402mw.escrow import database


class SimCursor(sqlite3.Cursor):
    """A cursor as SQLAlchemy's async engine wants it."""

    async def _async_soft_close(self) -> None:
        """Everything is fetched at once."""


class SimConnection(sqlite3.Connection):
    """A connection with such cursors."""

    def cursor(self, factory: Any = SimCursor, *, server_side: bool = False) -> Any:
        """Makes a cursor; all of them are where the rows are."""
        return super().cursor(factory)


class SimContext(SQLiteExecutionContext):
    """How streamed results are read."""

    def create_server_side_cursor(self) -> Any:
        """The same cursor as any."""
        return self._dbapi_connection.cursor(server_side=True)


class SimDialect(SQLiteDialect_pysqlite):
    """SQLite for SQLAlchemy's async engine, carried out at once: a transaction never yields."""

    driver = "sim"
    is_async = True
    supports_statement_cache = True
    supports_server_side_cursors = True
    execution_ctx_cls = SimContext

    def __hash__(self) -> int:
        return hash(type(self))

    def __eq__(self, other: object) -> bool:
        # All engines share one cache of compiled statements, which is keyed by the dialect.
        return type(self) is type(other)

    @classmethod
    def get_pool_class(cls, url: Any) -> Any:
        """The pool of async engines."""
        return AsyncAdaptedQueuePool

    def connect(self, *given: Any, **named: Any) -> Any:
        """Opens the file; the connection falls with its process."""
        connection = super().connect(*given, **named, factory=SimConnection)
        process = HERE.get()
        if process is not None:
            process.at_death.append(connection.close)
        return connection


_COMPILED: Any = LRUCache(500)


def open_engine(url: str) -> Any:
    """Opens a database as production does; its statements were compiled before."""
    engine = _open_engine(url)
    engine.sync_engine._compiled_cache = _COMPILED
    return engine


_urlparse = lru_cache(maxsize=4096)(httpx._urls.urlparse)  # type: ignore[attr-defined]
"""Parsing the same few addresses over and over would take a tenth of all time."""

_open_engine = database.open_engine
registry.register("sqlite.sim", __name__, "SimDialect")


def scratch_folder() -> Path:
    """Where the simulated disks are: in memory, where there is such a place."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and os.access(memory, os.W_OK) else Path(tempfile.gettempdir())


@cache
def empty_books() -> bytes:
    """A migrated escrow database, made once."""
    folder = Path(tempfile.mkdtemp(prefix="x402mw-sim-"))
    path = folder / "empty.db"

    async def make() -> None:
        engine = create_async_engine(f"sqlite+sim:///{path}")
        async with engine.begin() as connection:
            await database.migrate(connection)
        await engine.dispose()

    with at_once_sql():
        asyncio.run(make())
    try:
        return path.read_bytes()
    finally:
        shutil.rmtree(folder)


async def _at_once(function: Callable[..., Any], *args: Any, limiter: Any = None) -> Any:
    return function(*args)


async def _spawn(function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """SQLAlchemy's switch between its sync inside and asyncio, without a wait to insist on."""
    named.pop("_require_await", None)
    return await greenlet_spawn(function, *args, **named)


def at_once_sql() -> Any:
    """Lets SQLAlchemy's async engine take a driver that never waits."""
    return mock.patch("sqlalchemy.ext.asyncio.engine.greenlet_spawn", _spawn)


async def _migrated(_connection: Any) -> None:
    return None


@contextmanager
def simulated(seed: int) -> Iterator[None]:
    """Everything random comes from `seed`, and nothing uses a thread."""
    chance = random.Random(f"keys {seed}")
    state = random.getstate()
    random.seed(seed)
    logging.disable(logging.CRITICAL)
    with (
        at_once_sql(),
        mock.patch.object(os, "urandom", chance.randbytes),
        mock.patch.object(random, "_urandom", chance.randbytes),
        mock.patch("x402mw.escrow.redemption.run_sync", _at_once),
        mock.patch("httpx._urls.urlparse", _urlparse),
        mock.patch("x402mw.escrow.database.migrate", _migrated),
        mock.patch("x402mw.escrow.database.open_engine", open_engine),
        mock.patch("x402mw.escrow.database.normal_url", lambda text: f"sqlite+sim:///{text}"),
    ):
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
            random.setstate(state)

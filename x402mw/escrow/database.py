"""Opens the database and brings its schema up to date: SQLite by a file, PostgreSQL by a URL.

Transactions are short and decided under one lock: BEGIN IMMEDIATE on SQLite, a locked `service` row
on PostgreSQL (READ COMMITTED). Only connections that read begin without it.
"""

import logging
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, event, inspect, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    DisconnectionError,
    InterfaceError,
    InternalError,
    OperationalError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from x402mw.core.errors import ConfigurationError
from x402mw.sqlite_log import lost_commits

LOGGING_NAME = "x402mw"
_OPTIONS: dict[str, Any] = {
    "hide_parameters": True,
    "logging_name": LOGGING_NAME,
    "max_overflow": 0,
}
_READING = {"x402mw_reading": True}
BUSY_MILLISECONDS = 10_000
CACHE_KIBIBYTES = 16_384
CONNECTIONS_MAX = 8
_FORMS = "a database is a file path, sqlite:///... or postgresql://user:password@host:port/name"
_SETUP_LOCK = 402
_CONFLICTS = ("40001", "40P01")
# Of PostgreSQL's classes of errors: connection, resources, operator, system, internal.
_AWAY_CLASSES = ("08", "53", "57", "58", "XX")
_READ_ONLY = "25006"
_LOST_COMMITS_MAX = 1
"""Of one commit the power may have failed before anybody was told of it."""
_SQLITE_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def normal_url(text: str) -> str:
    """Accepts a plain path, `sqlite:///path` or `postgresql://...`, and names the async driver."""
    if "://" not in text:
        return f"sqlite+aiosqlite:///{text}"
    scheme, rest = text.split("://", 1)
    drivers = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}
    scheme = drivers.get(scheme, scheme)
    if scheme not in drivers.values():
        raise ConfigurationError(_FORMS)
    return f"{scheme}://{rest}"


def database_file(url: str) -> Path | None:
    """The file behind a SQLite URL; None for a database server."""
    try:
        parsed = make_url(normal_url(url))
    except (ValueError, ArgumentError):
        raise ConfigurationError(_FORMS) from None
    if parsed.get_backend_name() != "sqlite":
        return None
    if not parsed.database or parsed.database == ":memory:":
        raise ConfigurationError("money needs a database that outlives its process: name a file")
    return Path(parsed.database)


def open_engine(url: str) -> AsyncEngine:
    """Makes the engine, and an empty file if there is none. The caller disposes of it."""
    _keep_values_from_logs()
    options = _OPTIONS | {"pool_size": CONNECTIONS_MAX}
    file = database_file(url)
    if file is not None:
        if not file.exists():
            # SQLite would let everyone on the machine read who pays whom.
            file.touch(mode=0o600)
        engine = create_async_engine(normal_url(url), **options)
        _prepare_sqlite(engine.sync_engine)
        return engine
    options |= {"isolation_level": "READ COMMITTED"}
    try:
        engine = create_async_engine(normal_url(url), **options)
    except ImportError:
        raise ConfigurationError('PostgreSQL needs: pip install "x402mw[postgres]"') from None
    _replace_closed(engine.sync_engine)
    return engine


def _replace_closed(engine: Engine) -> None:
    """Takes no connection from the pool that the server has ended.

    The driver knows by itself; to ask the server each time is three round trips.
    """

    @event.listens_for(engine, "checkout")
    def checkout(connection: Any, _record: Any, _proxy: Any) -> None:
        if connection.driver_connection.is_closed():
            raise DisconnectionError


def may_block(engine: AsyncEngine) -> bool:
    """Tells whether it opens a file, which threads can work on: asyncio speaks to a server."""
    return engine.driver == "aiosqlite"


def open_blocking(engine: AsyncEngine, connections: int, *, reading: bool) -> Engine:
    """The same SQLite file for so many threads that block, to read it or to write to it."""
    url = engine.url.set(drivername="sqlite+pysqlite")
    options = {"execution_options": _READING if reading else {}, "pool_size": connections}
    blocking = create_engine(url, **(_OPTIONS | options))
    _prepare_sqlite(blocking)
    return blocking


def _keep_values_from_logs() -> None:
    """What people wrote and what they own is in the values, and must not reach a log.

    On DEBUG, SQLAlchemy writes rows (our engine has a logger of its own) and aiosqlite all values
    (it has one logger for everything in the process).
    """
    for name in (f"sqlalchemy.engine.Engine.{LOGGING_NAME}", "aiosqlite"):
        logging.getLogger(name).addFilter(_tells_no_values)


def _tells_no_values(record: logging.LogRecord) -> bool:
    return record.levelno > logging.DEBUG


def _prepare_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def connect(connection: Any, _record: Any) -> None:
        # The driver must not begin transactions by itself: it would begin them deferred.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_MILLISECONDS}")
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA foreign_keys = ON")
        # A batch touches more pages than fit by default, and would write them twice.
        cursor.execute(f"PRAGMA cache_size = -{CACHE_KIBIBYTES}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        reading = connection.get_execution_options().get("x402mw_reading")
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


@asynccontextmanager
async def reading(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """A connection that only reads, and sees one moment."""
    options: dict[str, Any] = dict(_READING)
    if engine.dialect.name == "postgresql":
        options["isolation_level"] = "REPEATABLE READ"
    async with engine.connect() as connection:
        await connection.execution_options(**options)
        async with connection.begin():
            yield connection


@asynccontextmanager
async def visiting(url: str) -> AsyncIterator[AsyncConnection]:
    """Reads a database beside the service, without changing even its schema."""
    engine = open_engine(url)
    try:
        async with reading(engine) as connection:
            if not await connection.run_sync(lambda sync: inspect(sync).has_table("service")):
                raise ConfigurationError("this database holds no escrow")
            yield connection
    finally:
        await engine.dispose()


def check_log(url: str) -> None:
    """Refuses a SQLite file that forgot commits; before it is opened, which tidies them away."""
    file = database_file(url)
    lost = 0 if file is None else lost_commits(str(file))
    if lost > _LOST_COMMITS_MAX:
        raise ConfigurationError(f"this database is damaged: its last {lost} commits are lost")


async def check_file(url: str) -> None:
    """Refuses a damaged SQLite file; a database server looks after its own files."""
    if database_file(url) is None:
        return
    async with visiting(url) as connection:
        problem = (await connection.exec_driver_sql("PRAGMA quick_check(1)")).scalar_one()
    if problem != "ok":
        raise ConfigurationError(f"this database is damaged: {problem.splitlines()[-1]}")


async def migrate(connection: AsyncConnection) -> None:
    """Brings the schema to the newest revision; processes that start at once wait for each other.

    The caller's transaction holds the lock to its end, so it may also write the first rows.
    """
    if connection.dialect.name == "postgresql":
        await connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_SETUP_LOCK})")
    try:
        await connection.run_sync(upgrade)
    except CommandError:
        message = "this database was made by a newer version of x402mw"
        raise ConfigurationError(message) from None


def upgrade(connection: Connection, revision: str = "head") -> None:
    """Runs the migrations up to a revision."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


def is_conflict(error: DBAPIError) -> bool:
    """Tells whether the database asks to run the very same transaction again."""
    return _sqlstate(error) in _CONFLICTS


def is_unavailable(error: BaseException) -> bool:
    """Tells whether the database cannot work now, as against refusing data.

    Locked, full, damaged, away, read-only after a failover, or too busy to end a conflict.
    """
    if isinstance(error, DBAPIError):
        state = _sqlstate(error)
        damage = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
        if error.connection_invalidated or damage in _SQLITE_DAMAGE:
            return True
        if state[:2] in _AWAY_CLASSES or state == _READ_ONLY or is_conflict(error):
            return True
    # A driver that lost its server in mid-word may call that an internal error.
    away = (OperationalError, InterfaceError, InternalError, PoolTimeout, OSError)
    return isinstance(error, away)


def _sqlstate(error: DBAPIError) -> str:
    return str(getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None) or "")

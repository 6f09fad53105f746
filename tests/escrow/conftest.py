"""The databases that the escrow's tests run on."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.escrow import ROOT_SEED, MovingClock, empty_books
from tests.support.postgresql import fresh_database
from x402mw.escrow.ledger import open_ledger
from x402mw.escrow.settings import Settings

DATABASES = ("sqlite", "postgresql")


@pytest.fixture(scope="session")
def empty_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with our tables in it, to copy: quicker than migrating."""
    file = tmp_path_factory.mktemp("empty") / "escrow.db"

    async def make() -> None:
        settings = Settings(str(file), ROOT_SEED)
        await (await open_ledger(settings, MovingClock(), serving=False)).close()

    asyncio.run(make())
    return file


@pytest.fixture(params=DATABASES)
def db(request: pytest.FixtureRequest, tmp_path: Path, empty_file: Path) -> Iterator[str]:
    """A database for an escrow on a `MovingClock`, of each kind: a file's path, or a URL."""
    if request.param == "sqlite":
        yield str(shutil.copy(empty_file, tmp_path / "escrow.db"))
    else:
        with fresh_database(empty_books()) as url:
            yield url


@pytest.fixture(params=DATABASES)
def empty_db(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database with nothing in it, of each kind."""
    if request.param == "sqlite":
        yield str(tmp_path / "empty.db")
    else:
        with fresh_database() as url:
            yield url


@pytest.fixture
def postgresql() -> Iterator[str]:
    """An empty PostgreSQL database, for what only makes sense there."""
    with fresh_database() as url:
        yield url

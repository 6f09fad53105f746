"""The databases that the escrow's tests run on."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.escrow import empty_books
from tests.support.postgresql import fresh_database

DATABASES = ("sqlite", "postgresql")


@pytest.fixture(params=DATABASES)
def db(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database for an escrow on a `MovingClock`, of each kind: a file's path, or a URL."""
    if request.param == "sqlite":
        yield str(tmp_path / "escrow.db")
    else:
        with fresh_database(empty_books()) as url:
            yield url


@pytest.fixture(params=DATABASES)
def empty_db(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database with nothing in it, of each kind."""
    if request.param == "sqlite":
        yield str(tmp_path / "escrow.db")
    else:
        with fresh_database() as url:
            yield url


@pytest.fixture
def postgresql() -> Iterator[str]:
    """An empty PostgreSQL database, for what only makes sense there."""
    with fresh_database() as url:
        yield url

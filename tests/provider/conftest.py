"""The databases that the journal's tests run on."""

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.postgresql import fresh_database
from x402mw.provider.journal import postgresql

DATABASES = ("sqlite", "postgresql")


@pytest.fixture(scope="session")
def database() -> Iterator[str]:
    """A PostgreSQL database for the journals of many tests, each in a schema of its own."""
    with fresh_database() as url:
        yield url


@pytest.fixture
def server_place(database: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place for a journal in PostgreSQL, where connections do not blink: who is gone is dead."""
    monkeypatch.setattr(postgresql, "FREE_ROUNDS", 1)
    return f"{database}&search_path=journal_{secrets.token_hex(8)}"


@pytest.fixture(params=DATABASES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place for a journal, of each kind: a file's path, or a URL."""
    if request.param == "sqlite":
        return str(tmp_path / "journal.db")
    return str(request.getfixturevalue("server_place"))

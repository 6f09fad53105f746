"""The databases that the journal's tests run on."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.postgresql import fresh_database

DATABASES = ("sqlite",)


@pytest.fixture(params=DATABASES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A place for a journal, of each kind: a file's path, or a URL."""
    if request.param == "sqlite":
        yield str(tmp_path / "journal.db")
    else:
        with fresh_database() as url:
            yield url

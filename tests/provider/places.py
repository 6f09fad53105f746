"""Looking into a journal's tables from outside, wherever it is."""

import asyncio
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import asyncpg

from x402mw.provider.journal.connections import schema_of


def execute(place: str, *statements: str) -> list[tuple[Any, ...]]:
    """Runs statements as a stranger, and returns the last one's rows."""
    if "://" in place:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, _execute(place, statements)).result()
    connection = sqlite3.connect(place)
    try:
        for statement in statements:
            found = connection.execute(statement).fetchall()
        connection.commit()
    finally:
        connection.close()
    return found


async def _execute(url: str, statements: tuple[str, ...]) -> list[tuple[Any, ...]]:
    connection = await asyncpg.connect(url, server_settings={"search_path": schema_of(url)})
    try:
        for statement in statements:
            found = await connection.fetch(statement)
    finally:
        await connection.close()
    return [tuple(row) for row in found]

"""Damaged files: a byte is changed in a copy of what a killed process left, which is then opened.

The copy stands apart: what opens it reaches nobody. It must be refused, or hold what the undamaged
copy holds. SQLite guards neither its pages nor its rows with checksums, so a changed byte may also
turn one row into another that makes sense (`altered`), and a damaged write-ahead log ends before
its time (`rolled back`), as a backup would; the summary counts both.
"""

import asyncio
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults import process
from tests.faults.board import Board
from tests.faults.process import World
from x402mw.core.errors import X402mwError
from x402mw.escrow.books import audit
from x402mw.escrow.database import check_file
from x402mw_client import Limits, Wallet

FILES = {"provider": "journal.db", "escrow": "escrow.db", "buyer": "wallet.db"}
ENDS = ("", "-wal")
REFUSED = 3
Content = dict[str, list[Any]] | None


def take(folder: Path, role: str, where: int) -> Path | None:
    """Copies a database as it lies there, and damages a second copy; returns their folder.

    `whole` and `read` are for us to read, `hurt` is to be opened. None if there is nothing yet.
    """
    place = folder / f"damaged-{role}"
    files = [folder / f"{FILES[role]}{end}" for end in ENDS]
    files = [path for path in files if path.exists() and path.stat().st_size]
    if not files or files[0].name != FILES[role]:
        return None
    (place / "whole").mkdir(parents=True)
    for path in files:
        shutil.copy(path, place / "whole")
    shutil.copytree(place / "whole", place / "hurt")
    _hurt(place, files, random.Random(where))
    shutil.copytree(place / "hurt", place / "read")
    return place


def _hurt(place: Path, files: list[Path], dice: random.Random) -> None:
    path = place / "hurt" / dice.choice(files).name
    data = bytearray(path.read_bytes())
    start = dice.randrange(len(data))
    for at in range(start, min(len(data), start + dice.choice((1, 1, 16, 512)))):
        data[at] ^= dice.randrange(1, 256)
    path.write_bytes(data)
    (place / "which").write_text(f"{path.name} at {start}")


def judge(place: Path, role: str, *, opened: bool) -> tuple[str, list[str]]:
    """What became of a damaged copy that was opened or refused; problems are what must not be."""
    whole, hurt = _content(place / "whole" / FILES[role]), _content(place / "read" / FILES[role])
    if not opened:
        return "refused", []
    if hurt is None:
        return "opened", [f"a {FILES[role]} that cannot be read was opened"]
    if hurt == whole:
        return "harmless", []
    if "-wal" in (place / "which").read_text():
        return "rolled back", []
    if role == "escrow" and asyncio.run(audit(str(place / "read" / FILES[role]))):
        return "found by the check", []
    return "altered", []


def _content(path: Path) -> Content:
    """All rows of all tables; None if they cannot be read."""
    connection = sqlite3.connect(path)
    try:
        (answer,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        schema = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")
        names = [name for (name,) in schema if not name.startswith("sqlite_")]
        rows = {
            name: sorted(map(repr, connection.execute(f"SELECT * FROM {name}"))) for name in names
        }
        return rows if answer == "ok" else None
    except (sqlite3.DatabaseError, UnicodeDecodeError):
        return None
    finally:
        connection.close()


def opener(role: str, world: World, board: Board, place: Path, port: int) -> Callable[[int], None]:
    """The life of a process that opens a damaged copy, where nobody is."""
    nowhere = f"http://127.0.0.1:{port + 1}"
    folder = place / "hurt"
    apart = replace(
        world,
        folder=folder,
        escrow_db=str(folder / FILES["escrow"]),
        journal=str(folder / FILES["provider"]),
        escrow_port=port,
        provider_ports=(port,),
        shared_port=port,
        escrow_from_provider=nowhere,
    )
    if role == "provider":
        return lambda pipe: process.provider(apart, board, pipe, 0)
    if role == "escrow":
        return lambda pipe: _open_escrow(apart, board, pipe)
    return partial(_open_wallet, apart)


def _open_escrow(world: World, board: Board, ready: int) -> None:
    """As `x402mw escrow serve` does: the file is checked before anyone is served."""
    try:
        asyncio.run(check_file(world.escrow_db))
    except Exception:
        os._exit(REFUSED)
    process.escrow(world, board, ready)


def _open_wallet(world: World, ready: int) -> None:
    try:
        Wallet(
            escrow=world.escrow_seen,
            api_key=world.buyer_key,
            limits=Limits(per_request="0.20", total="45.00"),
            path=world.folder / FILES["buyer"],
        )
    except X402mwError:
        os._exit(REFUSED)
    os.write(ready, b"r")

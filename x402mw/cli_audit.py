"""The command line: `x402mw audit verify` and `x402mw audit export`. `docs/audit.md`."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from x402mw.cli_shared import DATABASE, Database, check_exists, fail, run
from x402mw.core.errors import Malformed
from x402mw.core.strict import b64url_decode, loads_object
from x402mw.core.tokens import open_key_set

if TYPE_CHECKING:
    from x402mw.escrow.audit.verifying import Remembered, Verifier

app = typer.Typer(no_args_is_help=True, help="Verifies and exports the log of an escrow.")
_STEP = 1000


@app.command()
def verify(
    *,
    db: Database = DATABASE,
    file: Annotated[
        Path | None, typer.Option(exists=True, help="An export, instead of a database.")
    ] = None,
    root: Annotated[str | None, typer.Option(help="The root key that signs for it.")] = None,
    keys: Annotated[
        Path | None, typer.Option(exists=True, help="Its /.well-known/x402mw-keys, as a file.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(exists=True, help="An older export, or a checkpoint.")
    ] = None,
) -> None:
    """Verify the whole log once; name the first bad entry or checkpoint, with exit status 1."""
    from x402mw.escrow.audit.verifying import Broken, Verifier

    root_key, signing_keys = _trusted(root, keys)
    with _remembered(against, signing_keys) as older:
        verifier = Verifier(root_key, signing_keys, older)
        try:
            if file is None:
                _verify_database(db, verifier)
            else:
                _verify_file(file, verifier)
            verifier.check_signed()
        except Broken as broken:
            typer.echo(str(broken))
            raise typer.Exit(1) from None
    signed = (
        f"signed up to entry {verifier.covered}" if verifier.covered else "no checkpoint signs them"
    )
    typer.echo(f"{verifier.entries} entries verify; {signed}")
    if root_key is None:
        typer.echo("the root key was not compared: give --root or --keys", err=True)


def _trusted(root: str | None, keys: Path | None) -> tuple[bytes | None, Mapping[str, bytes]]:
    try:
        root_key = None if root is None else b64url_decode(root, 32)
    except Malformed as error:
        fail(f"--root: {error}")
    if keys is None:
        return root_key, {}
    answer = loads_object(keys.read_bytes())
    try:
        said = b64url_decode(answer["root_key"], 32)
        key_set = open_key_set(answer["key_set"], root_key or said)
    except (KeyError, TypeError):
        fail(f"{keys} is not the answer of /.well-known/x402mw-keys")
    return root_key or said, key_set.keys


@contextmanager
def _remembered(file: Path | None, keys: Mapping[str, bytes]) -> "Iterator[Iterator[Remembered]]":
    """What an older export or a checkpoint says; a checkpoint stands alone, as it was signed."""
    from x402mw.core.checkpoints import open_checkpoint
    from x402mw.escrow.audit.items import read_items
    from x402mw.escrow.audit.verifying import remember

    if file is None:
        yield iter(())
        return
    with file.open(encoding="utf-8") as lines:
        if lines.read(1) == "{":
            lines.seek(0)
            yield remember(read_items(lines))
            return
    if not keys:
        fail("a checkpoint alone is compared under --keys")
    point = open_checkpoint(file.read_text("ascii").strip(), keys)
    yield iter([(point.seq, point.hash)])


def _verify_file(file: Path, verifier: "Verifier") -> None:
    from x402mw.escrow.audit.items import read_items

    with file.open(encoding="utf-8") as lines:
        for item in read_items(lines):
            verifier.see(item)
    verifier.finish()


def _verify_database(db: str, verifier: "Verifier") -> None:
    from rich.console import Console
    from rich.progress import Progress

    from x402mw.escrow.audit.reading import count_entries, read_chain
    from x402mw.escrow.database import visiting

    check_exists(db)

    async def read() -> None:
        console = Console(stderr=True)
        shown = console.is_terminal
        with Progress(console=console, transient=True, disable=not shown) as progress:
            async with visiting(db) as connection:
                task = progress.add_task("verifying", total=await count_entries(connection))
                async for item in read_chain(connection):
                    verifier.see(item)
                    if verifier.entries % _STEP == 0:
                        progress.update(task, completed=verifier.entries)
        verifier.finish()

    run(read)


@app.command()
def export(
    *,
    db: Database = DATABASE,
    since: Annotated[int, typer.Option(min=0, help="Only what came after this entry.")] = 0,
    out: Annotated[Path | None, typer.Option(help="A new file; else it is printed.")] = None,
) -> None:
    """Write the log as JSON lines that any tool can verify."""
    check_exists(db)
    if out is None:
        _export(db, since, sys.stdout)
        return
    try:
        # Who pays whom is for the operator only, like the database.
        handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        fail(f"cannot write {out}: {error.strerror}")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        _export(db, since, file)


def _export(db: str, since: int, file: TextIO) -> None:
    from x402mw.escrow.audit.items import write_item
    from x402mw.escrow.audit.reading import read_chain
    from x402mw.escrow.database import visiting

    async def write() -> None:
        async with visiting(db) as connection:
            async for item in read_chain(connection, since):
                file.write(write_item(item) + "\n")

    run(write)

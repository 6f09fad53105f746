"""The operator's commands about the whole books: `x402mw books`, `escrow backup` and `restore`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from x402mw.cli_shared import DATABASE, Database, check_exists, fail, run
from x402mw.core.amounts import display

if TYPE_CHECKING:
    from x402mw.escrow.statement import Statement

_WIDE = 160


def add_commands(app: typer.Typer, escrow: typer.Typer) -> None:
    """Adds the commands to the program and to its `escrow` group."""
    app.command()(books)
    escrow.command()(backup)
    escrow.command()(restore)


def books(
    *,
    db: Database = DATABASE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show balances by class and escrows by state, and prove I1 to I20; exit status 1 if wrong."""
    import json

    from x402mw.escrow.statement import draw_up

    check_exists(db)
    found = run(lambda: draw_up(db))
    if as_json:
        typer.echo(json.dumps(_as_json(found), indent=2))
    else:
        _show(found)
    if found.violations:
        raise typer.Exit(1)


def _as_json(found: "Statement") -> dict[str, object]:
    return {
        "entries": found.entries,
        "accounts": [one._asdict() for one in found.accounts],
        "escrows": [one._asdict() for one in found.escrows],
        "violations": found.violations,
    }


def _show(found: "Statement") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        # Where nobody's window ends, no column is folded.
        console = Console(width=_WIDE)
    accounts = Table("asset", "accounts", title="Balances by class", box=SIMPLE_HEAD)
    for column in ("number", "balance"):
        accounts.add_column(column, justify="right")
    for one in found.accounts:
        accounts.add_row(one.asset, one.kind, f"{one.number:,}", display(one.balance))
    escrows = Table(
        *("asset", "kind", "status"),
        title="Escrows by state",
        box=SIMPLE_HEAD,
        collapse_padding=True,
    )
    for column in ("number", "locked", "released", "refunded", "held", "disputed"):
        escrows.add_column(column, justify="right", overflow="fold")
    for state in found.escrows:
        held = state.locked - state.released - state.refunded
        sums = (state.locked, state.released, state.refunded, held, state.disputed)
        escrows.add_row(
            *(state.asset, state.kind, state.status.replace("_", " "), f"{state.number:,}"),
            *map(display, sums),
        )
    console.print(accounts, escrows)
    for violation in found.violations:
        console.print(violation, style="red")
    if not found.violations:
        console.print(f"{found.entries:,} entries; I1 to I20 hold")


def backup(
    out: Annotated[Path, typer.Argument(help="The file to write; it must not exist.")],
    db: Database = DATABASE,
) -> None:
    """Write every row of this moment to a SQLite file, beside the service, and prove it.

    The root key is not in it: keep that apart.
    """
    if out.exists():
        fail(f"{out} exists already")
    check_exists(db)
    try:
        entries = _copy(db, str(out))
    except BaseException:
        out.unlink(missing_ok=True)
        raise
    typer.echo(f"{out} holds {entries:,} entries, and its books are right")


def restore(
    source: Annotated[Path, typer.Argument(help="A file that `backup` wrote.")],
    db: Database = DATABASE,
) -> None:
    """Copy a backup into a new database, and prove it; an escrow that is there is not touched."""
    check_exists(str(source))
    entries = _copy(str(source), db)
    typer.echo(f"{entries:,} entries restored, and the books are right")


def _copy(source: str, target: str) -> int:
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    from x402mw.escrow import backup as copying

    columns = (TextColumn("{task.description}"), TextColumn("{task.completed:,} rows"))
    console = Console(stderr=True)
    shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task("copying")

        def tell(table: str, rows: int) -> None:
            bar.update(task, description=table, completed=rows)

        return run(lambda: copying.copy(source, target, tell))

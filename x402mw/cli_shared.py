"""What the commands share: which database, and failures in one line."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Annotated, NoReturn, TypeVar

import typer

DATABASE_VARIABLE = "X402MW_ESCROW_DB"
DATABASE = "x402mw-escrow.db"

Database = Annotated[
    str,
    typer.Option(
        "--db",
        envvar=DATABASE_VARIABLE,
        help="A SQLite file, or postgresql://user:password@host/name.",
    ),
]
Result = TypeVar("Result")


def fail(message: str) -> NoReturn:
    """Ends the command with one line and exit status 1."""
    typer.echo(f"x402mw: {message}", err=True)
    raise SystemExit(1)


def check_exists(db: str) -> None:
    """Refuses a database file that is not there, which would be made."""
    from x402mw.escrow.database import database_file

    file = database_file(db)
    if file is not None and not file.exists():
        fail(f"there is no database {file}")


def run(work: Callable[[], Coroutine[None, None, Result]]) -> Result:
    """Runs work on a database; what the database objects to is one line."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return asyncio.run(work())
    except (OSError, SQLAlchemyError) as error:
        reason = str(getattr(error, "orig", error)).partition("\n")[0]
        fail(f"the database cannot be used: {reason}")

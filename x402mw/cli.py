"""The command line: `x402mw escrow ...`, `x402mw register`, `x402mw doctor`, `x402mw demo`.

A composition root: it reads options and the environment and wires the parts, which are imported
inside the commands, so that `x402mw --help` works whatever extras are installed.
"""

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

try:
    import typer
except ImportError:  # pragma: no cover (needs an environment without the extra)
    sys.exit('the x402mw command needs its extras: pip install "x402mw[demo]"')

from x402mw import cli_accounts, cli_audit, cli_books
from x402mw.cli_shared import DATABASE, Database, check_exists, fail, run
from x402mw.core.amounts import to_atomic
from x402mw.core.errors import X402mwError
from x402mw.core.strict import b64url_encode
from x402mw.escrow.settings import LOCAL_PROXIES, NETWORK, Settings
from x402mw.telemetry.logs import LogFormat, LogLevel, configure

if TYPE_CHECKING:
    from x402mw.doctor.examination import Diagnosis
    from x402mw.escrow.ledger import Ledger

ROOT_KEY_VARIABLE = "X402MW_ROOT_KEY"

app = typer.Typer(
    no_args_is_help=True,
    help="Payments between programs, over plain HTTP.",
    # The pretty form prints local variables, and some of ours are keys.
    pretty_exceptions_enable=False,
)
escrow = typer.Typer(no_args_is_help=True, help="Runs and audits an escrow service.")
app.add_typer(escrow, name="escrow")
app.add_typer(cli_audit.app, name="audit")

Result = TypeVar("Result")


def main() -> None:
    """Runs the command line; our own errors become one line and exit status 1."""
    try:
        app()
    except X402mwError as error:
        fail(str(error))


@escrow.command()
def serve(
    *,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free port.")] = 8401,
    db: Database = DATABASE,
    network: Annotated[str, typer.Option(help="Fixed once there is a database.")] = NETWORK,
    min_escrow: Annotated[str, typer.Option(help="The least a session locks.")] = "1.00",
    faucet: Annotated[str, typer.Option(help="What a new agent may claim once.")] = "1.00",
    faucet_daily: Annotated[str, typer.Option(help="All claims of one day; 0 = off.")] = "100.00",
    test_faucet: Annotated[str, typer.Option(help="The same for test agents.")] = "100.00",
    test_faucet_daily: Annotated[str, typer.Option(help="All their claims of a day.")] = "10000.00",
    faucet_per_source: Annotated[int, typer.Option(help="Claims of one address a day.")] = 10,
    local_webhooks: Annotated[
        bool, typer.Option(help="Allow webhooks to this machine and its network.")
    ] = False,
    trusted_proxies: Annotated[
        str,
        typer.Option(envvar="FORWARDED_ALLOW_IPS", help="Whose X-Forwarded-For is believed."),
    ] = LOCAL_PROXIES,
    log_format: Annotated[LogFormat, typer.Option(help="How records are written.")] = "text",
    log_level: Annotated[LogLevel, typer.Option(help="The least that is written.")] = "warning",
) -> None:
    """Serve the escrow until SIGTERM; prints its URL and root key as NAME=value lines."""
    from x402mw.core.keys import public_key
    from x402mw.escrow import serve as server
    from x402mw.escrow.app import create_app, say_farewell

    configure(log_format, log_level)
    settings = Settings(
        database_url=db,
        root_seed=_root_seed(db, may_create=True),
        network=network,
        min_escrow=to_atomic(min_escrow),
        faucet_amount=to_atomic(faucet),
        faucet_daily=to_atomic(faucet_daily),
        faucet_claims_per_source=faucet_per_source,
        test_faucet_amount=to_atomic(test_faucet),
        test_faucet_daily=to_atomic(test_faucet_daily),
        local_webhooks=local_webhooks,
    )
    # Opened once before anyone is served, so that what is wrong with it is told in one line.
    run(lambda: _open_once(settings))
    try:
        sock = server.bind(host, port)
    except OSError as error:
        fail(f"cannot listen on {host} port {port}: {error.strerror}")

    def announce() -> None:
        print(f"X402MW_ESCROW={server.url_of(sock)}", flush=True)  # noqa: T201
        root_key = b64url_encode(public_key(settings.root_seed))
        print(f"X402MW_ESCROW_ROOT={root_key}", flush=True)  # noqa: T201

    service = create_app(settings)
    if not server.run(service, sock, announce, trusted_proxies, lambda: say_farewell(service)):
        fail("the escrow did not start")


async def _open_once(settings: Settings) -> None:
    from x402mw.escrow.database import check_file, check_log
    from x402mw.escrow.ledger import visit_ledger

    check_log(settings.database_url)
    async with visit_ledger(settings, time.time):
        await check_file(settings.database_url)


@escrow.command()
def check(db: Database = DATABASE) -> None:
    """Prove a whole database: balances, fees, every escrow, the hash chain."""
    from x402mw.escrow.books import audit

    check_exists(db)
    violations = run(lambda: audit(db))
    for violation in violations:
        typer.echo(violation)
    if violations:
        raise typer.Exit(1)
    typer.echo("the books balance and the chain verifies")


@escrow.command(name="rotate-key")
def rotate_key(db: Database = DATABASE) -> None:
    """Retire the signing key and start the next; a running service follows at once."""
    _with_ledger(db, lambda ledger: ledger.rotate_keys())
    typer.echo("a new signing key is in use; old tokens stay redeemable")


def _with_ledger(db: str, use: "Callable[[Ledger], Awaitable[Result]]") -> Result:
    """Opens an existing database beside the service, uses it and lets go of it."""
    from x402mw.escrow.ledger import find_network, visit_ledger

    check_exists(db)
    root_seed = _root_seed(db, may_create=False)

    async def visit() -> Result:
        settings = Settings(db, root_seed, network=await find_network(db))
        async with visit_ledger(settings, time.time) as ledger:
            return await use(ledger)

    return run(visit)


cli_accounts.add_commands(escrow, _with_ledger)
cli_books.add_commands(app, escrow)


def _root_seed(db: str, *, may_create: bool) -> bytes:
    from x402mw.escrow.database import database_file
    from x402mw.escrow.keys import load_root_seed

    file = database_file(db)
    path = None if file is None else Path(f"{file}.rootkey")
    # Beside a database that exists, a missing key was lost: a new one would disown every session.
    may_create = may_create and file is not None and not file.exists()
    return load_root_seed(path, os.environ.get(ROOT_KEY_VARIABLE), may_create=may_create)


@app.command()
def register(
    name: Annotated[str, typer.Argument(help="What to call the agent.")],
    escrow_url: Annotated[str, typer.Option("--escrow", help="The escrow's URL.")],
) -> None:
    """Register an agent and print the settings of a provider or buyer as NAME=value lines."""
    import httpx

    from x402mw.core.strict import b64url_decode
    from x402mw.core.tokens import open_key_set

    base = escrow_url.rstrip("/")
    try:
        with httpx.Client(timeout=10) as http:
            keys = http.get(f"{base}/.well-known/x402mw-keys").raise_for_status().json()
            open_key_set(keys["key_set"], b64url_decode(keys["root_key"], 32))
            agent = http.post(f"{base}/api/v1/agents", json={"name": name}).json()
            if "detail" in agent:
                fail(f"{base} refused: {agent['detail']}")
            api_key, agent_id = agent["api_key"], agent["agent_id"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        fail(f"{base} did not answer as an escrow: {reason}")
    typer.echo(f"X402MW_ESCROW={base}")
    typer.echo(f"X402MW_AGENT={agent_id}")
    typer.echo(f"X402MW_API_KEY={api_key}")
    typer.echo("X402MW_JOURNAL=x402mw-journal.db")
    typer.echo("X402MW_ORIGINS=http://127.0.0.1:8402")
    typer.echo(f"X402MW_ESCROW_ROOT={keys['root_key']}")


@app.command()
def doctor(
    url: Annotated[str, typer.Argument(help="A priced URL, as buyers call it.")],
    *,
    method: Annotated[str, typer.Option(help="The method that is sold there.")] = "GET",
    escrow_root: Annotated[
        str | None, typer.Option(help="The root key that its escrow should have.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Examine a provider without paying: proxies, headers, clocks, escrow.

    Exit status 0: fine. 1: problems. 2: unreachable, or nothing of ours.
    """
    import json

    import httpx
    from rich.console import Console

    from x402mw.doctor.examination import examine
    from x402mw.doctor.report import show

    async def run() -> "Diagnosis":
        async with httpx.AsyncClient(trust_env=url.startswith("https:")) as http:
            return await examine(
                url, http, time.time, method=method.upper(), escrow_root=escrow_root
            )

    try:
        diagnosis = asyncio.run(run())
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        fail(f"{url} is no URL that can be asked: {error}")
    if as_json:
        typer.echo(json.dumps(diagnosis.as_json(), indent=2))
    else:
        show(diagnosis, Console())
    raise typer.Exit(diagnosis.verdict.status)


@app.command()
def demo(
    *,
    keep: Annotated[bool, typer.Option(help="Leave everything running at the end.")] = False,
) -> None:
    """Buy for real between three processes, and check that the books balance."""
    from demo_provider.run import main as run_demo

    raise typer.Exit(run_demo(keep=keep))


if __name__ == "__main__":
    main()

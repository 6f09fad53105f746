"""The processes of a schedule, as they begin after the fork: escrow, provider, buyer.

Each is the component as anyone would run it, with short intervals, a clock that the lane can move,
and its failpoints installed. Nothing of ours may have run an event loop, a thread or a database
connection in the process they are forked from.
"""

import asyncio
import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import uvicorn

from tests.faults import mutants, points, shop, shopper
from tests.faults.board import Board
from x402mw.core.amounts import to_atomic
from x402mw.escrow.app import create_app
from x402mw.escrow.ledger import visit_ledger
from x402mw.escrow.serve import AnnouncingServer, run
from x402mw.escrow.settings import Settings
from x402mw.provider import Provider, link, redeemer, responder, service
from x402mw.provider.journal import connections, journal, redemption, sqlite, writer
from x402mw_client import flow, operations

ROOT_SEED = bytes(range(32))
ROUND_SECONDS = 0.05
CONTACT_SECONDS = 0.3
_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
HASTE = 0.1
"""How much of each wait of the buyer is really waited for."""


@dataclass(frozen=True, slots=True)
class World:
    """All that the processes of one schedule need to find each other.

    `escrow_db` and `journal` are places as a user writes them. `escrow_seen` and `provider_seen`
    are URLs: where the buyer finds each, and `escrow_from_provider` where the provider finds the
    escrow; a proxy may stand between.
    """

    folder: Path
    escrow_db: str
    journal: str
    escrow_port: int
    provider_ports: tuple[int, ...]
    shared_port: int
    escrow_from_provider: str
    escrow_seen: str
    provider_seen: str
    seller_key: str
    buyer_key: str
    redeem_seconds: int
    durability: Literal["fsync", "process"]
    read_seconds: float
    deposit: str
    threads: bool = False
    mutant: str = ""


def settings_of(escrow_db: str) -> Settings:
    """The escrow as every schedule has it."""
    return Settings(
        escrow_db,
        ROOT_SEED,
        min_escrow=to_atomic("0.10"),
        faucet_amount=to_atomic("50.00"),
        faucet_daily=to_atomic("1000.00"),
    )


def escrow(world: World, board: Board, ready: int) -> None:
    """Serves the escrow until a signal."""
    _begin(board, "escrow", world)
    app = create_app(settings_of(world.escrow_db), clock=board.clock("escrow"))
    if not run(app, _listen(world.escrow_port), partial(_announce, ready), ""):
        os._exit(3)


def rotate_keys(world: World, board: Board) -> None:
    """Does what `x402mw escrow rotate-key` does beside a running service."""

    async def rotate() -> None:
        async with visit_ledger(settings_of(world.escrow_db), board.clock("escrow")) as ledger:
            await ledger.rotate_keys()

    asyncio.run(rotate())


def provider(world: World, board: Board, ready: int, worker: int) -> None:
    """Serves one worker of the shop until a signal."""
    _begin(board, "provider", world)
    _hurry_provider()
    shop.open_log(world.folder / "executions.log")
    selling = Provider(
        escrow=world.escrow_from_provider,
        api_key=world.seller_key,
        journal=world.journal,
        durability=world.durability,
        redeem_seconds=world.redeem_seconds,
        free_calls_per_minute=100_000,
        clock=board.clock("provider"),
    )
    config = uvicorn.Config(
        shop.make_app(selling, dearer=board.dearer),
        # A handler of the shop fails on purpose, and uvicorn would write that down each time.
        log_level="critical",
        access_log=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=1,
    )
    server = _Announcing(config, partial(_announce, ready))
    sockets = [_listen(world.provider_ports[worker]), _listen(world.shared_port)]
    # uvicorn repeats the signal that stopped it; after a clean end this process ends by itself.
    signal.signal(signal.SIGTERM, lambda *_: None)
    server.run(sockets=sockets)
    if not server.started:
        os._exit(3)


def buyer(world: World, board: Board, ready: int, script: dict[str, Any]) -> None:
    """Carries out the script, from where an earlier life of this buyer left it."""
    _begin(board, "buyer", world)
    operations.PAUSES_SECONDS = (0.0, 0.02, 0.1)
    flow.TURN_SECONDS = 1.0
    points.patch("asyncio:sleep", _hasten(asyncio.sleep))
    points.patch("time:sleep", _hasten_plain(time.sleep))
    asyncio.run(shopper.shop(world, board, script, partial(_announce, ready)))


def _begin(board: Board, role: str, world: World) -> None:
    logging.basicConfig(level=logging.WARNING, format=f"{role} %(name)s: %(message)s")
    # Reading the machine's certificates takes longer than a call, and everything here is loopback.
    points.patch("httpx._transports.default:create_ssl_context", lambda **_: _NO_TLS)
    mutants.apply(world.mutant)
    points.install(board, role)


def _announce(ready: int) -> None:
    os.write(ready, b"r")


class _Announcing(AnnouncingServer):
    """A server of any configuration that says when it listens."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]) -> None:
        uvicorn.Server.__init__(self, config)
        self._announce = announce
        self._farewell = lambda: None


def _listen(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Workers share a port; the kernel deals the connections out.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", port))
    return sock


def _hurry_provider() -> None:
    """Intervals fit for a schedule of a second."""
    operations.PAUSES_SECONDS = (0.0, 0.02, 0.1)
    link.REFRESH_SECONDS = 0
    redeemer.BACKOFF_SECONDS_MAX = 0.3
    service.SETTLE_RETRY_SECONDS = 0.05
    journal.VOID_RETRY_SECONDS = 0.05
    writer.ROUND_SECONDS = 0.1
    # So that a worker that is stopped for a moment loses its turn.
    sqlite.TURN_SECONDS = 0.3
    connections.LOCK_MS, connections.STOPPED_MS = 300, 600
    redemption.REST_SECONDS = 1
    responder.MARK_SECONDS = 0.01
    quick = partial(redeemer.Redeemer, contact_seconds=CONTACT_SECONDS, round_seconds=ROUND_SECONDS)
    points.patch("x402mw.provider.provider:Redeemer", quick)


def _hasten(sleep: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def hasty(seconds: float, result: Any = None) -> Any:
        return await sleep(seconds * HASTE if seconds > shopper.STEP_SECONDS else seconds, result)

    return hasty


def _hasten_plain(sleep: Callable[[float], None]) -> Callable[[float], None]:
    return lambda seconds: sleep(seconds * HASTE if seconds > shopper.STEP_SECONDS else seconds)

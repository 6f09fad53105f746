"""Runs the escrow as a process: one socket, one announcement, a clean end on SIGTERM."""

import gc
import signal
import socket
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from x402mw.escrow.settings import LOCAL_PROXIES

KEEP_ALIVE_SECONDS = 30
SHUTDOWN_SECONDS = 10
HEADER_BYTES_MAX = 16 * 1024


def bind(host: str, port: int) -> socket.socket:
    """Takes the address now, so that port 0 has become a real port when it is announced."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small answers without delay (40 ms each) only if the protocol is named here.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    return sock


def url_of(sock: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class AnnouncingServer(uvicorn.Server):
    """A uvicorn server that says when it really listens."""

    def __init__(
        self,
        app: ASGIApp,
        announce: Callable[[], None],
        trusted_proxies: str = LOCAL_PROXIES,
        farewell: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                # Whoever starts the process says where records go, uvicorn's own among them.
                log_config=None,
                log_level="warning",
                access_log=False,
                ws="none",
                lifespan="on",
                # The app stamps its own Date, and which server this is concerns nobody.
                date_header=False,
                server_header=False,
                # The other parser that may be installed takes headers without end.
                http="h11",
                h11_max_incomplete_event_size=HEADER_BYTES_MAX,
                forwarded_allow_ips=trusted_proxies,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            )
        )
        self._announce = announce
        self._farewell = farewell

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts as usual, then announces."""
        await super().startup(sockets=sockets)
        if self.started:
            self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Says farewell to answers that have no end of their own, then stops as usual."""
        self._farewell()
        await super().shutdown(sockets=sockets)


def run(
    app: ASGIApp,
    sock: socket.socket,
    announce: Callable[[], None],
    trusted_proxies: str,
    farewell: Callable[[], None] = lambda: None,
) -> bool:
    """Serves until a signal; returns whether it ever started."""

    def settle_and_announce() -> None:
        # What start-up made stays; walking through it again and again would hold up requests.
        gc.freeze()
        announce()

    server = AnnouncingServer(app, settle_and_announce, trusted_proxies, farewell)
    # uvicorn repeats the signal that stopped it; after a clean end there is nothing left to kill.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server.run(sockets=[sock])
    return server.started

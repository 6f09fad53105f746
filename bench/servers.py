"""The HTTP part of the bench: which servers run, and what is asked of each."""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from bench import load
from bench.handlers import PATHS
from bench.market import Account, Buyer, Market
from bench.processes import Process, free_port, running
from bench.rounds import BARE, Cell
from bench.serve import SETTINGS

OURS = ("ours-fsync", "ours-process")
FLOORS = ("floor-fsync", "floor-process")
PEERS = ("x402-exact", "x402-batch", "pympp")
WORKERS = "-2w"
"""Ends the names of servers with two workers."""
SESSIONS = 32
Say = Callable[[str], None]


class Servers:
    """All servers of the bench, running, and buyers for each."""

    def __init__(self, market: Market, buyer: Account, stack: contextlib.ExitStack) -> None:
        self._market, self._account, self._stack = market, buyer, stack
        self.running: dict[str, Process] = {}
        self.buyers: dict[str, Any] = {}

    def start(self, name: str) -> None:
        """Starts one server, and opens sessions with it if it is ours."""
        port, folder = free_port(), self._market.folder
        kind = name.removesuffix(WORKERS)
        settings = {}
        if kind in OURS:
            settings[SETTINGS] = json.dumps(self._market.provider(name))
        workers = "2" if name.endswith(WORKERS) else "1"
        server = running(
            name, folder, "bench.serve", kind, str(port), workers, port=port, settings=settings
        )
        self.running[name] = self._stack.enter_context(server)
        if kind in OURS:
            url = self.running[name].url
            buyer = Buyer(self._market, self._account, url, sessions=SESSIONS)
            self._stack.callback(buyer.close)
            self.buyers[name] = buyer
        elif kind in PEERS:
            from bench import peers

            self.buyers[name] = peers.BUYERS[kind](port)

    def try_start(self, name: str, say: Say) -> None:
        """Starts what may not be there; says so if it is not."""
        try:
            self.start(name)
        except Exception as error:
            self.running.pop(name, None)
            say(f"  {name} is left out: {str(error).strip().splitlines()[-1][:200]}")

    def paid(self, name: str, path: str = "/item") -> Callable[[int], list[bytes]]:
        """Makes paid requests for a server."""
        # The floor takes any well-formed payment, so ours serves.
        buyer = self.buyers.get(name) or self.buyers[OURS[0]]
        return lambda count: buyer.requests(path, count)

    def plain(self, name: str, path: str = "/item") -> Callable[[int], list[bytes]]:
        """Makes requests without payment."""
        host = f"127.0.0.1:{self.running[name].port}"
        request = f"GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n".encode()
        return lambda count: [request] * count

    def paid_cells(self) -> list[Cell]:
        """Bare and everything paid, in the order of a round."""
        found = [Cell(BARE, self.running[BARE], self.plain(BARE))]
        found += [
            Cell(f"{name} paid", self.running[name], self.paid(name))
            for name in (*OURS, *FLOORS, *PEERS)
            if name in self.running
        ]
        return found

    def unpaid_cells(self) -> list[Cell]:
        """Bare and everything unpaid."""
        names = (OURS[0], FLOORS[0], *PEERS)
        return [
            Cell(BARE, self.running[BARE], self.plain(BARE)),
            *(
                Cell(f"{name} unpaid", self.running[name], self.plain(name), status="402")
                for name in names
                if name in self.running
            ),
        ]

    def slow_cells(self) -> list[Cell]:
        """Handlers that take their time, bare and paid."""
        found = []
        for ending in [ending for ending in PATHS if ending]:
            base = BARE + ending
            found.append(
                Cell(base, self.running[BARE], self.plain(BARE, "/item" + ending), base=base)
            )
            found += [
                Cell(
                    f"{name}{ending} paid",
                    self.running[name],
                    self.paid(name, "/item" + ending),
                    base=base,
                )
                for name in (*OURS, *FLOORS)
            ]
        return found

    def worker_cells(self) -> list[Cell]:
        """Two workers, bare and paid, on all cores."""
        names = [name for name in self.running if name.endswith(WORKERS) and name != BARE + WORKERS]
        if not names:
            return []
        base = BARE + WORKERS
        return [
            Cell(base, self.running[base], self.plain(base), base=base),
            *(
                Cell(f"{name} paid", self.running[name], self.paid(name), base=base)
                for name in names
            ),
        ]


@contextlib.contextmanager
def open_servers(market: Market, *, peers: bool, workers: bool, say: Say) -> Iterator[Servers]:
    """Starts everything there is."""
    with contextlib.ExitStack() as stack:
        servers = Servers(market, market.account("100000"), stack)
        for name in (BARE, *OURS, *FLOORS):
            servers.start(name)
        for name in (BARE, *OURS) if workers else ():
            servers.try_start(name + WORKERS, say)
        for name in PEERS if peers else ():
            servers.start(name)
        load.pin(1)
        yield servers

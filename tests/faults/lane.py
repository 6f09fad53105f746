"""A lane: one board, one relay, one template of an escrow, and one schedule after the other.

The lane is the process from which all others are forked. It starts them, breaks them as the
schedule says, heals everything, lets everyone come to an end, and then asks the oracle.
"""

import http.client
import json
import shutil
import signal
import socket
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults import process, proxy
from tests.faults.board import Board
from tests.faults.children import Family, Late
from tests.faults.databases import open_databases
from tests.faults.points import POINTS
from tests.faults.process import World
from tests.faults.schedules import LINKS, Fault, Schedule
from tests.faults.story import START_SECONDS, Run, Story

PORTS = 20


@dataclass
class Account:
    """An agent of the template."""

    agent_id: str
    api_key: str


class Ports:
    """Twenty ports of this machine that no other lane has; held by listening on the last."""

    def __init__(self) -> None:
        for base in range(20_000, 32_000, PORTS):
            self._guard = socket.socket()
            try:
                self._guard.bind(("127.0.0.1", base + PORTS - 1))
            except OSError:
                self._guard.close()
                continue
            self.links = dict(zip(LINKS, range(base, base + len(LINKS)), strict=True))
            self.escrow, self.shared, self.spare = base + 4, base + 5, base + 6
            self.workers = tuple(range(base + 8, base + 12))
            return
        raise RuntimeError("all ports are taken")


class Lane:
    """Runs schedules. Make it in a process that never ran an event loop or a thread."""

    def __init__(self, folder: Path, database: str = "sqlite", *, mutant: str = "") -> None:
        self.folder = folder
        self.database = database
        self.mutant = mutant
        folder.mkdir(parents=True, exist_ok=True)
        self.board = Board()
        self.ports = Ports()
        self.relays, self.family = Family(), Family()
        self._control: Any = None
        self._start_relay()
        self.databases = open_databases(database, folder)
        self.seller, self.buyer = Account("", ""), Account("", "")
        self._make_template()

    def close(self) -> None:
        """Ends everything."""
        self.family.kill_all()
        self.relays.kill_all()
        self.databases.close()

    # The relay.

    def _start_relay(self) -> None:
        ours, theirs = socket.socketpair()
        links = [proxy.Link(name, port) for name, port in self.ports.links.items()]

        def serve(_pipe: int) -> None:
            ours.close()
            import asyncio

            asyncio.run(proxy.Relay(links).serve(theirs))

        self.relays.fork("relay", self.folder / "relay.log", serve)
        theirs.close()
        ours.settimeout(10)
        self._control = ours.makefile("rw")

    def _order(self, **order: Any) -> list[list[str]]:
        """Gives the relay an order; returns the faults that have fired so far."""
        self._control.write(json.dumps(order) + "\n")
        self._control.flush()
        fired: list[list[str]] = json.loads(self._control.readline())
        return fired

    # The template.

    def _make_template(self) -> None:
        """An escrow that knows a seller and a buyer with money, to be copied for each schedule."""
        folder = self.folder / "template"
        folder.mkdir()
        world = self._world(folder, self.databases.template, "")
        child = self.family.fork(
            "escrow", folder / "log", partial(process.escrow, world, self.board)
        )
        self.family.wait(lambda: bool(child.said), START_SECONDS, "the template")
        self.seller, self.buyer = self._register("seller"), self._register("buyer")
        self.ask("POST", "/faucet/claim", self.buyer, {})
        child.send(signal.SIGTERM)
        self.family.wait(lambda: not child.alive, START_SECONDS, "the template's end")

    def _register(self, name: str) -> Account:
        answer = self.ask("POST", "/agents", None, {"name": name})
        return Account(answer["agent_id"], answer["api_key"])

    def ask(self, method: str, path: str, account: Account | None, body: Any = None) -> Any:
        """Asks the escrow itself, past the relay."""
        fields = {"Authorization": f"Bearer {account.api_key}"} if account else {}
        connection = http.client.HTTPConnection("127.0.0.1", self.ports.escrow, timeout=5)
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, f"/api/v1{path}", text, fields)
            answer = connection.getresponse()
            return json.loads(answer.read())
        finally:
            connection.close()

    def _world(self, folder: Path, escrow_db: str, journal: str) -> World:
        links = self.ports.links
        return World(
            folder=folder,
            escrow_db=escrow_db,
            journal=journal,
            escrow_port=self.ports.escrow,
            provider_ports=self.ports.workers,
            shared_port=self.ports.shared,
            escrow_from_provider=_url(links["provider-escrow"]),
            escrow_seen=_url(links["buyer-escrow"]),
            provider_seen=_url(links["buyer-provider"]),
            seller_key="",
            buyer_key="",
            redeem_seconds=1,
            durability="process",
            read_seconds=1.0,
            deposit="1.00",
            mutant=self.mutant,
        )

    # One schedule.

    def run(self, schedule: Schedule) -> Run:
        """Runs a schedule from beginning to end."""
        started = time.monotonic()
        folder = self.folder / "now"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        run = Run(schedule, folder)
        self.board.clear()
        world = self._prepare(schedule, folder)
        try:
            Story(self, run, world).tell()
        except Late as late:
            run.problems.append(f"stuck: {late}")
        finally:
            self.family.forget_timers()
            self.family.kill_all()
            self.databases.drop(world.escrow_db)
        run.seconds = time.monotonic() - started
        run.passed = [
            self.board.hits(point, side) for point in range(len(POINTS)) for side in (0, 1)
        ]
        return run

    def _prepare(self, schedule: Schedule, folder: Path) -> World:
        world = self._world(folder, *self.databases.copy(folder))
        ports, seen = self.ports, {}
        for link, name, port in (
            ("buyer-provider", "provider_seen", ports.shared),
            ("buyer-escrow", "escrow_seen", ports.escrow),
            ("provider-escrow", "escrow_from_provider", ports.escrow),
        ):
            if link not in schedule.proxied:
                seen[name] = _url(port)
        return replace(
            world,
            **seen,  # type: ignore[arg-type]  # three URLs
            seller_key=self.seller.api_key,
            buyer_key=self.buyer.api_key,
            redeem_seconds=schedule.redeem_seconds,
            durability=schedule.durability,
            read_seconds=schedule.read_seconds,
            deposit=schedule.deposit,
            threads=schedule.threads,
        )

    def route(self, workers: int, faults: list[Fault]) -> None:
        """Tells the relay where its links lead, and what to spoil."""
        targets = {
            "buyer-provider": list(self.ports.workers[:workers]),
            "buyer-escrow": [self.ports.escrow],
            "provider-escrow": [self.ports.escrow],
        }
        wanted = [fault.more for fault in faults if fault.family == "proxy"]
        self._order(targets=targets, faults=wanted)

    def spoiled(self, *, reset: bool) -> list[str]:
        """Ends the relay's faults; returns those that have fired."""
        return [f"{link} {kind}" for link, kind in self._order(faults=[], reset=reset)]


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}"

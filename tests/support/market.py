"""A whole market for tests: escrow and provider as processes, which may die and come back."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from tests.support.escrow import Agent, EscrowProcess

ROOT = Path(__file__).parents[2]
START_SECONDS = 30


def free_port() -> int:
    """A port of this machine that nobody listens on right now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass
class ShopProcess:
    """Real uvicorn processes serving `tests.whole.shop`, always on the same port and journal.

    With more than one of `workers` uvicorn itself starts them, and starts again those that die.
    """

    folder: Path
    settings: dict[str, str]
    app: str = "tests.whole.shop:app"
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    workers: int = 1
    journal: str = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts it and waits until it answers a free path."""
        workers = ("--workers", str(self.workers)) if self.workers > 1 else ()
        with (self.folder / "shop.log").open("ab") as output:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "uvicorn", self.app, "--port", str(self.port)),
                    *("--no-access-log", "--log-level", "warning"),
                    *workers,
                ],
                cwd=ROOT,
                stdout=output,
                stderr=output,
                env={
                    **os.environ,
                    **self.settings,
                    "SHOP_LOG": str(self.folder / "executions.log"),
                    "X402MW_JOURNAL": self.journal or str(self.folder / "journal.db"),
                    "X402MW_ORIGINS": self.url,
                },
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                httpx.get(self.url, timeout=2)
            except httpx.TransportError:
                time.sleep(0.05)
            else:
                return
        raise AssertionError((self.folder / "shop.log").read_text()[-3000:])

    def kill(self) -> None:
        """Ends it like a power cut of the process: SIGKILL."""
        for worker in self.worker_processes():
            worker.kill()
        self._end(signal.SIGKILL)

    def worker_processes(self) -> list[psutil.Process]:
        """The workers that uvicorn has started by now, if it has several."""
        if self.process is None:
            return []
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if _is_worker(child)]

    def terminate(self) -> None:
        """Ends it politely: it redeems what it can and closes its journal."""
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.send_signal(number)
            process.wait(timeout=30)

    def executions(self) -> Counter[str]:
        """How often each thing ran, as the app itself counted."""
        log = self.folder / "executions.log"
        return Counter(log.read_text().splitlines()) if log.exists() else Counter()


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


@dataclass
class Market:
    """An escrow process, a shop process, and an account for the buyer."""

    escrow: EscrowProcess
    shop: ShopProcess
    buyer: Agent
    seller: Agent

    def balance(self, agent: Agent) -> str:
        """What an agent owns outside of escrows, in display units."""
        answer = httpx.get(f"{self.escrow.url}/api/v1/agents/me", headers=agent.headers, timeout=10)
        answer.raise_for_status()
        return str(answer.json()["balance"])

    def sessions(self) -> list[dict[str, str]]:
        """Every session of the buyer, as the escrow shows it."""
        answer = httpx.get(
            f"{self.escrow.url}/api/v1/escrow?role=buyer&limit=100",
            headers=self.buyer.headers,
            timeout=10,
        )
        answer.raise_for_status()
        return list(answer.json()["items"])


@contextmanager
def open_market(
    folder: Path, *, funds: str = "50.00", workers: int = 1, journal: str = ""
) -> Iterator[Market]:
    """Starts both processes, registers both parties and funds the buyer."""
    escrow = EscrowProcess(folder / "escrow.db")
    escrow.start()
    shop = None
    try:
        printed = escrow.command("register", "--escrow", escrow.url, "shop")
        settings = dict(line.split("=", 1) for line in printed.splitlines() if "=" in line)
        answer = httpx.post(f"{escrow.url}/api/v1/agents", json={"name": "buyer"}, timeout=10)
        buyer = Agent(answer.json()["agent_id"], answer.json()["api_key"])
        escrow.deposit(buyer.agent_id, funds)
        shop = ShopProcess(folder, settings, workers=workers, journal=journal)
        shop.start()
        seller = Agent(settings["X402MW_AGENT"], settings["X402MW_API_KEY"])
        yield Market(escrow, shop, buyer, seller)
    finally:
        if shop is not None:
            shop.kill()
        escrow.kill()

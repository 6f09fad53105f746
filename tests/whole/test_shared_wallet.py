"""Several real processes on one wallet file: one budget, one session, and books that agree."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.market import ROOT, Market, open_market
from x402mw.core.amounts import to_atomic
from x402mw_client import Limits, Wallet

pytestmark = pytest.mark.whole

TOTAL = "0.20"
SEED = 402


@dataclass
class Agents:
    """Processes of one agent, and what they print."""

    market: Market
    folder: Path
    spent: int = 0

    @property
    def wallet(self) -> Path:
        return self.folder / "wallet.db"

    def start(self, name: str, calls: int, total: str = TOTAL) -> subprocess.Popen[str]:
        """Starts one more process."""
        return subprocess.Popen(
            [sys.executable, "-m", "tests.whole.agent", name, str(calls)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT / "client"),
                "ESCROW": self.market.escrow.url,
                "BUYER_KEY": self.market.buyer.api_key,
                "SHOP": self.market.shop.url,
                "WALLET": str(self.wallet),
                "TOTAL": total,
            },
        )

    def held(self) -> int:
        """How many calls the file shows as open."""
        db = sqlite3.connect(self.wallet)
        try:
            return int(db.execute("SELECT count(*) FROM calls").fetchone()[0])
        finally:
            db.close()

    def close(self) -> int:
        """The last process of them: closes what is open, and tells what was spent."""
        wallet = Wallet(
            escrow=self.market.escrow.url,
            api_key=self.market.buyer.api_key,
            limits=Limits(per_request="0.01", total="5.00"),
            path=self.wallet,
        )
        wallet.close()
        return wallet.spent

    def check(self, spent: int) -> None:
        """What was spent is what was executed, once each, and what the escrow paid out."""
        self.spent += spent
        ran = self.market.shop.executions()
        assert max(ran.values()) == 1
        assert self.spent == 1000 * ran.total()
        sessions = self.market.sessions()
        assert all(to_atomic(session["remaining"]) == 0 for session in sessions)
        assert self.spent == sum(to_atomic(session["released"]) for session in sessions)
        self.market.escrow.check()


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agents]:
    """A market, and nobody in it yet."""
    folder = tmp_path_factory.mktemp("market")
    with open_market(folder) as market:
        yield Agents(market, folder)


@pytest.fixture
def agents(market: Agents, tmp_path: Path) -> Agents:
    """The same market, for agents with a new wallet."""
    market.folder = tmp_path
    return market


def test_three_processes_spend_one_budget(agents: Agents) -> None:
    """Together they spend the total to the last unit and no more, out of one session."""
    running = [agents.start(name, 100) for name in "abc"]
    said = [process.communicate(timeout=60)[0].split("\n") for process in running]
    assert [process.returncode for process in running] == [0] * 3
    outcomes = [line.split()[1] for lines in said for line in lines if line]
    assert outcomes.count("limit-total") == 24
    assert outcomes.count("200") == 200
    assert len(agents.market.sessions()) == 1
    spent = agents.close()
    assert spent == to_atomic(TOTAL)
    agents.check(spent)


def test_killed_and_stopped_processes(agents: Agents) -> None:
    """After SIGKILL and SIGSTOP at any moment the others go on, and nothing is lost or doubled."""
    dice = random.Random(SEED)
    running = {name: agents.start(name, 200, "5.00") for name in "de"}
    for round_ in range(4):
        for process in running.values():
            assert process.stdout is not None
            for _ in range(dice.randint(5, 20)):
                assert process.stdout.readline()
        name, victim = dice.choice(list(running.items()))
        if round_ % 2:
            victim.send_signal(signal.SIGSTOP)
            time.sleep(0.3)  # Long enough for the others to need what it holds or blocks.
            victim.send_signal(signal.SIGCONT)
        else:
            victim.kill()
            victim.communicate()
            del running[name]
            running[name + "x"] = agents.start(name + "x", 200, "5.00")
    for process in running.values():
        process.kill()
        process.communicate()
    assert agents.held() > 0
    agents.check(agents.close())
    assert agents.held() == 0
    assert not list(agents.folder.glob("wallet.db.*.lock"))

"""The README's code is run as it stands, against real servers.

Each block of Python stands under a comment: `<!-- test: provider -->` is served by uvicorn,
`<!-- test: buyer -->` is run as a program that buys from it, `<!-- test: skip -->` only compiles.
"""

import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.support.escrow import escrow_process
from tests.support.market import ShopProcess

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"(?:<!-- test: (\w+) -->\n+)?```python\n(.*?)```", re.DOTALL)
BLOCKS = [(kind, code) for kind, code in BLOCK.findall(README.read_text())]


def blocks(kind: str) -> list[str]:
    """The code of all blocks of a kind."""
    return [code for found, code in BLOCKS if found == kind]


def test_every_block_is_tested() -> None:
    """No Python in the README is left to rot; one block sells and one buys."""
    assert {kind for kind, _ in BLOCKS} <= {"provider", "buyer", "skip"}
    assert blocks("provider")
    assert blocks("buyer")
    for _, code in BLOCKS:
        compile(code, "README.md", "exec")


def test_the_readme_is_short() -> None:
    """A newcomer reads it to the end."""
    assert len(README.read_text().splitlines()) < 200


@pytest.mark.whole
def test_the_readme_sells_and_buys(tmp_path: Path) -> None:
    """Whoever copies the provider and the buyer gets a paid answer, and the money arrives."""
    (tmp_path / "readme_app.py").write_text("\n".join(blocks("provider")))
    with escrow_process(tmp_path) as escrow:
        printed = escrow.command("register", "--escrow", escrow.url, "readme")
        settings = dict(line.split("=", 1) for line in printed.splitlines() if "=" in line)
        agent = httpx.post(f"{escrow.url}/api/v1/agents", json={"name": "buyer"}, timeout=10).json()
        escrow.deposit(agent["agent_id"], "5.00")
        shop = ShopProcess(tmp_path, settings | {"PYTHONPATH": str(tmp_path)}, "readme_app:app")
        shop.start()
        try:
            for code in blocks("buyer"):
                printed = run_buyer(tmp_path, code, escrow.url, shop.url, agent["api_key"])
                assert printed.startswith("200 ")
        finally:
            shop.terminate()
        seller = {"Authorization": f"Bearer {settings['X402MW_API_KEY']}"}
        earned = httpx.get(f"{escrow.url}/api/v1/agents/me", headers=seller, timeout=10).json()
        assert float(earned["balance"]) > 0
        escrow.check()


def run_buyer(folder: Path, code: str, escrow: str, shop: str, api_key: str) -> str:
    """Runs a buyer's program with the addresses of this test in place of the README's."""
    for written, real in (
        ("http://127.0.0.1:8401", escrow),
        ("http://127.0.0.1:8402", shop),
        ("pf_live_...", api_key),
    ):
        code = code.replace(written, real)
    program = folder / "readme_buyer.py"
    program.write_text(code)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(program)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

"""The page about the escrow's client: its code is run as it stands, and it leaves no method out."""

import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.support.escrow import escrow_process
from x402mw_client.escrow import AsyncEscrowClient, EscrowClient

PAGE = (Path(__file__).parents[2] / "docs" / "escrow-client.md").read_text()
BLOCK = re.compile(r"(?:<!-- test: (\w+) -->\n+)?```python\n(.*?)```", re.DOTALL)
BLOCKS = BLOCK.findall(PAGE)
OWN = {"run", "walk", "follow", "url", "last_date", "aclose", "close_connections"}


def test_every_block_is_tested() -> None:
    """No Python of the page is left to rot."""
    assert [kind for kind, _ in BLOCKS] == ["run", "run"]


def test_every_method_is_named() -> None:
    """What the clients can do stands in the table, and nothing that they cannot."""
    table = re.findall(r"^\| [^|]+ \| (.+) \|$", PAGE, re.MULTILINE)
    named = {name for row in table for name in re.findall(r"`(\w+)`", row)}
    for client in (EscrowClient, AsyncEscrowClient):
        assert {name for name in dir(client) if not name.startswith("_")} - OWN == named


@pytest.mark.whole
def test_the_page_runs(tmp_path: Path) -> None:
    """Whoever copies the page buys a report, and the books balance."""
    printed = []
    with escrow_process(tmp_path) as escrow:
        wish = {"name": "buyer", "mode": "test"}
        buyer = httpx.post(f"{escrow.url}/api/v1/agents", json=wish, timeout=10).json()
        for _, code in BLOCKS:
            code = code.replace("http://127.0.0.1:8401", escrow.url)
            program = tmp_path / "page.py"
            program.write_text(code.replace("pf_test_...", buyer["api_key"]))
            done = subprocess.run(
                [sys.executable, "-W", "error", str(program)],
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.returncode == 0, done.stderr
            printed.append(done.stdout.splitlines())
        escrow.check()
    assert printed[0][:3] == ["6000000", "settled 85000", "2 escrows"]
    assert "release 2500000 0" in printed[1]

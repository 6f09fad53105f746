"""The documents and the code say the same."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text()
HEADINGS = set(re.findall(r"^##+ (.+)$", PROTOCOL, re.MULTILINE))
SOURCES = [
    *(ROOT / "x402mw" / "core").rglob("*.py"),
    *(ROOT / "x402mw" / "provider").rglob("*.py"),
    *(ROOT / "client").rglob("*.py"),
]


def refusals() -> set[tuple[str, str]]:
    """Every (code, status) with which the provider refuses."""
    found = set()
    for path in SOURCES:
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call):
                continue
            values = [item.value for item in call.args if isinstance(item, ast.Constant)]
            name = ast.unparse(call.func)
            if name == "_later":
                found.add((str(values[0]), "503"))
            elif re.search(r"(\bRefused|\brefused|send_problem)$", name):
                numbers = [str(value) for value in values if isinstance(value, int)]
                texts = [value for value in values if isinstance(value, str)]
                if numbers and texts:
                    found.add((texts[0], numbers[0]))
    return found


def documented() -> set[tuple[str, str]]:
    """Every (code, status) of the table under "Errors"."""
    table = PROTOCOL.split("\n## Errors\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \| (\d{3}) \|", table, re.MULTILINE)
    return {(code, status) for codes, status in rows for code in re.findall(r"`(\w+)`", codes)}


def test_every_refusal_is_documented() -> None:
    """Each code that the provider sends stands in the table with its status."""
    assert len(refusals()) > 20
    assert refusals() - documented() == set()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_docstrings_refer_to_headings_that_exist(path: Path) -> None:
    """`docs/protocol.md`, Heading: the heading is there."""
    text = " ".join(path.read_text().split())
    for name in re.findall(r"`docs/protocol\.md`, ([A-Z][\w ]*?)[).;:]", text):
        assert name in HEADINGS, name


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    """A link between the documents leads to a file that is there."""
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target

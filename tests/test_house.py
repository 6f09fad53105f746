"""The rules of the house, so that the next change cannot forget them.

* `core` is pure: an allow-list of imports, and nothing that reads a clock, randomness or a file.
* `x402mw_client` imports of ours only `x402mw.core`; `provider` never imports `escrow`, and of the
  client only the escrow's API client; `escrow` imports neither.
* Only the composition roots read the environment. No import cycles.
* A function fits a screen, a file has one subject, a test says which rule it proves.
* Nothing tracked names a machine's folders or a package registry.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 400
TEST_FILE_LINES_MAX = 600
CORE_IMPORTS = {
    "base64", "binascii", "collections", "contextlib", "dataclasses", "decimal", "enum",
    "fractions", "hashlib", "json", "re", "struct", "typing", "urllib", "joserfc", "nacl",
    "pydantic",
}  # fmt: skip
IMPURE = re.compile(
    r"(\.now|\.today|\.utcnow|\.generate|\.generate_key|\.random|\.urandom|\.read_text|\.read_bytes"
    r"|^open|^print|^input|^time\.\w+|^os\.\w+|^random\.\w+|^secrets\.\w+|^uuid\.\w+)$"
)
SETTINGS = {"x402mw/cli.py", "x402mw/provider/settings.py"}
ESCROW_API = ("x402mw_client.escrow", "x402mw_client.operations", "x402mw_client.records")
REGISTRIES = re.compile(r"(pypi|pythonhosted|npmjs|crates)\.(org|io|com)|proxy\.golang\.org")
MACHINE_PATHS = re.compile(r"(?<![\w.])/(work|root|home/\w+|Users/\w+)/")


@cache
def tracked() -> list[Path]:
    """Every file of the repository, or of its folder where there is no git."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        hidden = {".venv", ".git", "dist", "build"}
        found = [path for path in ROOT.rglob("*") if not hidden & set(path.parts)]
        return [path for path in found if path.is_file()]
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def sources(*folders: str) -> list[Path]:
    """The Python files under these folders."""
    return [
        path
        for path in tracked()
        if path.suffix == ".py" and path.relative_to(ROOT).as_posix().startswith(folders)
    ]


PACKAGES = ("x402mw/", "client/", "demo_provider/")
SHIPPED = sources(*PACKAGES)
ALL = sources("")


def name_of(path: Path) -> str:
    """The dotted name of a module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "client" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree_of(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(path.read_text())


MODULES = {name_of(path) for path in SHIPPED}


def imports_of(path: Path, *, lazy: bool = True) -> Iterator[str]:
    """The modules that a file imports; `lazy` also finds those inside functions."""
    body = ast.walk(tree_of(path)) if lazy else iter(tree_of(path).body)
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in inner)


def places(path: Path, kind: type[ast.AST]) -> Iterator[ast.AST]:
    """All nodes of a kind in a file."""
    return (node for node in ast.walk(tree_of(path)) if isinstance(node, kind))


def short(path: Path) -> str:
    """The path as people write it."""
    return path.relative_to(ROOT).as_posix()


def below(name: str, *rooms: str) -> bool:
    """Whether a module is one of these or inside them."""
    return any(name == room or name.startswith(room + ".") for room in rooms)


@pytest.mark.parametrize("path", sources("x402mw/core/"), ids=short)
def test_the_core_is_pure(path: Path) -> None:
    """The core imports nothing that acts, and calls nothing that looks outside."""
    for name in imports_of(path):
        assert below(name, "x402mw.core") or name.partition(".")[0] in CORE_IMPORTS, name
    for call in places(path, ast.Call):
        written = ast.unparse(call.func)
        assert not IMPURE.search(written), f"line {call.lineno}: {written}"


@pytest.mark.parametrize("path", SHIPPED, ids=short)
def test_rooms_keep_to_themselves(path: Path) -> None:
    """Client, provider and escrow know the core, and of each other as little as stated above."""
    here = name_of(path)
    for name in imports_of(path):
        if below(here, "x402mw_client"):
            assert not below(name, "x402mw", "demo_provider") or below(name, "x402mw.core"), name
        if below(here, "x402mw.provider"):
            assert not below(name, "x402mw.escrow", "demo_provider"), name
            assert not below(name, "x402mw_client") or below(name, *ESCROW_API), name
        if below(here, "x402mw.escrow"):
            assert not below(name, "x402mw.provider", "x402mw_client", "demo_provider"), name
        assert not below(name, "tests"), name


def test_only_the_composition_roots_read_the_environment() -> None:
    """Settings are read in one place of each program and handed on as arguments."""
    for path in SHIPPED:
        reads = re.search(r"\b(environ|getenv)\b", path.read_text())
        allowed = short(path) in SETTINGS or short(path).startswith("demo_provider/")
        assert allowed or not reads, short(path)


def test_no_import_cycles() -> None:
    """Modules form layers, so each can be read after what it stands on."""
    graph = {
        name_of(path): set(imports_of(path, lazy=False)) & MODULES - {name_of(path)}
        for path in SHIPPED
    }
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", ALL, ids=short)
def test_files_and_functions_stay_small(path: Path) -> None:
    """No function is over 70 lines, and no file over 400; tables of cases may take 600."""
    most = FILE_LINES_MAX if path in SHIPPED else TEST_FILE_LINES_MAX
    assert len(path.read_text().splitlines()) <= most
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= FUNCTION_LINES_MAX, f"{node.name}: {lines} lines"


@pytest.mark.parametrize("path", sources("tests/"), ids=short)
def test_every_test_says_what_it_proves(path: Path) -> None:
    """A test without a sentence proves nothing to a reader."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name[:5] == "test_":
            assert ast.get_docstring(node), f"{node.name}, line {node.lineno}"


@pytest.mark.parametrize("path", tracked(), ids=short)
def test_nothing_names_this_machine(path: Path) -> None:
    """No tracked text names folders of a machine or the host of a package registry."""
    try:
        text = path.read_text()
    except UnicodeDecodeError:
        return
    if path == Path(__file__):
        return
    assert not MACHINE_PATHS.search(text)
    assert not REGISTRIES.search(text)
    assert "tests" in path.parts or "/tmp/" not in text


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("x402mw", ["pydantic", "httpx", "starlette", "sqlalchemy"]),
        ("x402mw.core.gate", ["httpx", "starlette", "sqlalchemy"]),
        ("x402mw_client", ["starlette", "sqlalchemy"]),
        ("x402mw.provider", ["sqlalchemy", "x402mw.escrow"]),
        ("x402mw.cli", ["sqlalchemy", "starlette"]),
    ],
)
def test_imports_stay_light(module: str, absent: list[str]) -> None:
    """A fresh interpreter that imports one room does not load the others' dependencies."""
    asked = f"import sys, {module}; print(*[name for name in {absent} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, cwd="/")
    assert (found.returncode, found.stdout.strip(), found.stderr) == (0, "", "")


def test_the_license_is_whole() -> None:
    """The licence file holds the full Apache 2.0 text."""
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert len(text) > 11_000

"""What is shipped: three packages, their data, and nothing that would shadow a buyer's modules."""

import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("x402mw", "x402mw_client", "demo_provider")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this tree with the backend that is installed here."""
    folder = tmp_path_factory.mktemp("dist")
    code = f"from hatchling.build import build_wheel; build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    """No module of ours can shadow a `client.py` or `tests` of whoever installs it."""
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)
    for package in PACKAGES:
        assert f"{package}/py.typed" in names
    sources = {
        path.relative_to(base).as_posix()
        for base in (ROOT, ROOT / "client")
        for package in PACKAGES
        for path in (base / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == sources


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    """Name, licence and command are in the metadata."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = next(name.split("/")[0] for name in names if ".dist-info/" in name)
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        entry = archive.read(f"{info}/entry_points.txt").decode()
    assert metadata["Name"] == "x402mw"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"{info}/licenses/LICENSE" in names
    assert "x402mw = x402mw.cli:main" in entry


def test_the_wheel_works_elsewhere(wheel: Path, tmp_path: Path) -> None:
    """Installed somewhere else, all three packages import from there."""
    target = tmp_path / "site"
    install = [*(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")]
    subprocess.run(
        [*install, "--disable-pip-version-check", "--target", str(target), str(wheel)],
        check=True,
        capture_output=True,
    )
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "import x402mw.provider, x402mw_client, x402mw.escrow, demo_provider, x402mw.cli\n"
        "for name in ('x402mw', 'x402mw_client', 'demo_provider'):\n"
        f"    assert sys.modules[name].__file__.startswith({str(target)!r}), name\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr

"""The corpus: inputs that each reach something of their own, one packed text file per target."""

import base64
import json
import zlib
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent / "corpus"
BYTES_MAX = 200 * 1024
LINE = 96


def load(target: str) -> list[bytes]:
    """The inputs of a target; none if it has no file yet."""
    path = FOLDER / f"{target}.txt"
    if not path.exists():
        return []
    packed = base64.b64decode("".join(path.read_text().split()))
    return [bytes.fromhex(one) for one in json.loads(zlib.decompress(packed))]


def save(target: str, inputs: Iterable[bytes]) -> None:
    """Packs the inputs of a target, the shortest first."""
    found = sorted(set(inputs), key=lambda one: (len(one), one))
    text = json.dumps([one.hex() for one in found])
    packed = base64.b64encode(zlib.compress(text.encode(), 9)).decode()
    lines = [packed[at : at + LINE] for at in range(0, len(packed), LINE)]
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{target}.txt").write_text("\n".join(lines) + "\n")


def size() -> int:
    """How many bytes the whole corpus takes in the repository."""
    return sum(path.stat().st_size for path in FOLDER.glob("*.txt"))

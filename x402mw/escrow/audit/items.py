"""What an audit reads, one item after the other, and how an export writes it: JSON lines.

    opening, then entries with checkpoints among them, then the end

The text of an entry is exactly what its hash covers, so any tool can verify an export with nothing
but JSON, SHA-256 and Ed25519. `docs/audit.md`.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from x402mw.core.errors import Malformed

FORMAT = "x402mw-audit-1"


@dataclass(frozen=True, slots=True)
class Opening:
    """Whose books, and from which entry on: the first item comes after entry `since`."""

    network: str
    root_key: str
    proofs: tuple[str, ...]
    since: int
    previous_hash: str
    format: str = FORMAT


@dataclass(frozen=True, slots=True)
class Link:
    """One entry: `form` 1 says only what moves, 2 also who and why."""

    seq: int
    form: int
    text: str
    previous_hash: str
    hash: str


@dataclass(frozen=True, slots=True)
class Point:
    """One signed checkpoint."""

    seq: int
    hash: str
    created_at: int
    signature: str


@dataclass(frozen=True, slots=True)
class End:
    """There is no more: the newest entry."""

    seq: int
    hash: str


Item = Opening | Link | Point | End
_KINDS: dict[str, type[Item]] = {
    "opening": Opening,
    "entry": Link,
    "checkpoint": Point,
    "end": End,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}
_READERS: dict[str, TypeAdapter[Any]] = {name: TypeAdapter(kind) for name, kind in _KINDS.items()}


def write_item(item: Item) -> str:
    """One line of an export, without its end."""
    return json.dumps({"type": _NAMES[type(item)], **asdict(item)}, separators=(",", ":"))


def read_items(lines: Iterable[str]) -> Iterator[Item]:
    """Reads an export, or raises `Malformed` naming the line."""
    for number, line in enumerate(lines, 1):
        try:
            given = json.loads(line)
            reader = _READERS[given.pop("type")]
            item: Item = reader.validate_python(given)
        except (ValueError, KeyError, TypeError, AttributeError, ValidationError, RecursionError):
            raise Malformed(f"line {number} of the export cannot be read") from None
        yield item

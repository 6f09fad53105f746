"""Ids as they are written: a prefix and 32 hex digits, whose 16 bytes go into signed messages."""

import re

from x402mw.core.errors import Malformed

ID_BYTES = 16
AGENT, ESCROW, JOURNAL = "ag_", "esc_", "jr_"
_HEX = re.compile(r"[0-9a-f]{32}", re.ASCII)


def format_id(prefix: str, raw: bytes) -> str:
    """Writes 16 bytes as an id: `esc_` for sessions, `jr_` for journals, `ag_` for agents."""
    if len(raw) != ID_BYTES:
        raise Malformed(f"an id has {ID_BYTES} bytes")
    return prefix + raw.hex()


def parse_id(prefix: str, text: object) -> bytes:
    """Reads the 16 bytes of an id with the expected prefix, or raises `Malformed`."""
    digits = text.removeprefix(prefix) if isinstance(text, str) and text.startswith(prefix) else ""
    if not _HEX.fullmatch(digits):
        raise Malformed(f"expected an id like {prefix} and 32 hex digits")
    return bytes.fromhex(digits)

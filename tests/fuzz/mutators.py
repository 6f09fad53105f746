"""Structured mutation: bytes, texts, JSON values and the ways to write them.

Random bytes stop at the first layer of base64. These start from valid artefacts and bend one layer
at a time, so that everything behind it is reached. Every choice comes from the `Random` given.
"""

import base64
import copy
import json
from random import Random
from typing import Any

EDGE_NUMBERS = [0, 1, 2, -1, 59, 60, 86_400, 86_401, 255, 256, 2**31, 2**32 - 1, 2**32, 2**53 - 1]
EDGE_NUMBERS += [2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63)]
EDGE_TEXTS = ["", "0", "1", "00", "-1", "+1", "1.0", "1e3", "1_0", " 1", "0x1", "1" * 19, "9" * 19]
EDGE_TEXTS += [str(2**63 - 1), str(2**63), "٣", "NaN", "Infinity", "1e-400", "8.4e-05", "0.0000001"]
EDGE_TEXTS += [
    "\x00",
    "a\nb",
    "é",
    "\u202e",
    "\ud800",
    "ﬀ",
    "K",
    "🄀",
    "x" * 129,
    "x" * 2049,
    "/",
    "//",
]
EDGE_TEXTS += ["esc_" + "0" * 32, "ag_" + "f" * 32, "jr_" + "G" * 32, "A" * 43, "A" * 235, "a.b.c"]
EDGE_TEXTS += [
    "GET /quote/{symbol}",
    "HEAD /",
    "POST /x/{a:path}",
    "get /",
    "/{a}{b}{c}{d}",
    "/\\x",
]
EDGE_TEXTS += [
    "USDC",
    "escrow:test",
    "batch-settlement",
    "EdDSA",
    "none",
    "Ed25519",
    "OKP",
    "token",
]
EDGE_VALUES: list[Any] = [None, True, False, [], {}, [[]], {"a": 1}, 1.5, -0.0, 1e300]
BYTES = [
    b"",
    b"\x00",
    b"=",
    b"==",
    b"-",
    b"_",
    b"+",
    b"/",
    b".",
    b"..",
    b"\n",
    b"\xff",
    b"\xc3",
    b"A",
]
BYTES += [
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\u0000",
    b"\\ud83d",
    b"1e9",
    b"NaN",
    b"null",
    b" ",
]


def flip(raw: bytes, draw: Random) -> bytes:
    """Changes a few bytes: flips, inserts, deletes, repeats or swaps."""
    data = bytearray(raw)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(data) + 1)
        act = draw.randrange(6)
        if act == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif act == 1:
            data[at:at] = draw.choice(BYTES)
        elif act == 2:
            del data[at : at + draw.choice((1, 1, 2, 8, 64))]
        elif act == 3 and at < len(data):
            data[at] = draw.randrange(256)
        elif act == 4:
            data[at:at] = data[at : at + draw.choice((1, 2, 8, 64))] * draw.choice((1, 2, 16))
        else:
            other = draw.randrange(len(data) + 1)
            low, high = sorted((at, other))
            data[low:high] = bytes(reversed(data[low:high]))
    return bytes(data)


def bend_text(text: str, draw: Random) -> str:
    """Changes a text a little, or wholly."""
    act = draw.randrange(6)
    if act == 0:
        return draw.choice(EDGE_TEXTS)
    if act == 1:
        return text + draw.choice(EDGE_TEXTS)
    if act == 2:
        return draw.choice(EDGE_TEXTS) + text
    if act == 3:
        return text.swapcase()
    return flip(text.encode("utf-8", "replace"), draw).decode("utf-8", "replace")


def bend_value(value: Any, draw: Random) -> Any:
    """Puts something else in the place of a value, often of the same type."""
    act = draw.randrange(8)
    if act == 0:
        return copy.deepcopy(draw.choice(EDGE_VALUES))
    if act == 1:
        return draw.choice(EDGE_NUMBERS)
    if act == 2:
        return draw.choice(EDGE_TEXTS)
    if isinstance(value, bool) or value is None:
        return draw.choice((True, False, None, 0, 1, "true"))
    if isinstance(value, int) and abs(value) < 10**40:
        return draw.choice((value + 1, value - 1, -value, value * 1000, str(value), value + 0.5))
    if isinstance(value, str):
        return draw.choice((bend_text(value, draw), [value], draw.choice(EDGE_TEXTS)))
    return draw.choice((value, [value], [value, value], {"a": value}, str(value)[:100]))


def bend_json(value: Any, draw: Random, *, times: int = 1) -> Any:
    """Changes one or more places of a JSON value, which itself stays as it is."""
    value = json.loads(json.dumps(value, default=str))
    for _ in range(times):
        holders = list(_holders(value))
        if not holders:
            return bend_value(value, draw)
        holder = draw.choice(holders)
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        act = draw.randrange(10)
        if act == 0 and isinstance(holder, dict):
            holder[draw.choice(EDGE_TEXTS)] = copy.deepcopy(draw.choice(EDGE_VALUES))
        elif act == 1 and isinstance(holder, list):
            holder.append(bend_value(None, draw))
        elif not keys:
            continue
        elif act == 2:
            del holder[draw.choice(keys)]
        elif act == 3:
            one, two = draw.choice(keys), draw.choice(keys)
            holder[one], holder[two] = holder[two], holder[one]
        elif act == 4 and isinstance(holder, list):
            holder.extend(holder[-1:] * draw.choice((1, 3, 70)))
        else:
            one = draw.choice(keys)
            holder[one] = bend_value(holder[one], draw)
    return value


def _holders(value: Any) -> Any:
    if isinstance(value, (dict, list)):
        yield value
        for child in list(value.values()) if isinstance(value, dict) else list(value):
            yield from _holders(child)


def write_json(value: Any, draw: Random) -> bytes:
    """Writes JSON: mostly as we do, sometimes in another spelling, sometimes not quite JSON."""
    act = draw.randrange(16)
    text = json.dumps(value, ensure_ascii=act == 0, separators=(",", ":"))
    if act == 1:
        text = json.dumps(value, indent=1)
    elif act == 2 and text.startswith("{"):
        text = '{"x402Version":2,' + text[1:]
    elif act == 3 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + "," + text[1:]
    elif act == 4:
        digits = [at for at, letter in enumerate(text) if letter.isdigit()]
        at = draw.choice(digits) if digits else 0
        text = (
            text[: at + 1]
            + draw.choice((".0", "e0", "E+1", "0" * 5000, "e999999999"))
            + text[at + 1 :]
        )
    elif act == 5:
        depth = draw.choice((7, 8, 9, 1000))
        text = text[:-1] + ',"deep":' + "[" * depth + "]" * depth + "}"
    elif act == 6:
        text = draw.choice(("\ufeff", " ", "\n", "")) + text + draw.choice((" ", "\x00", "{}", ""))
    elif act == 7:
        text = text.replace(
            '"', '"' + draw.choice(("\\u0061", "\\ud800", "\\ud83d\\ude00", "\\n")), 1
        )
    return text.encode("utf-8", "surrogatepass")


def read_json(raw: bytes) -> Any:
    """The JSON of some bytes, or None: what a mutator can work on."""
    if raw.count(b"[") + raw.count(b"{") > 300:
        return None
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def write_base64(raw: bytes, draw: Random, *, url: bool = False) -> bytes:
    """Writes base64: mostly right, sometimes with the wrong alphabet, padding or spare bits."""
    encode = base64.urlsafe_b64encode if url else base64.b64encode
    text = encode(raw).rstrip(b"=") if url else encode(raw)
    act = draw.randrange(40)
    if act == 0:
        return text.rstrip(b"=")
    if act == 1:
        return text + b"="
    if act == 2:
        return text.translate(bytes.maketrans(b"+/-_", b"-_+/"))
    if act == 3 and text:
        return text[:-1] + draw.choice((b"B", b"C", b"/", b"_", b"\n"))
    return flip(text, draw) if act == 4 else text


def respell_base64(text: bytes, draw: Random) -> bytes:
    """Changes the last letter, whose low bits may stand for nothing, or the end behind it."""
    if not draw.randrange(3):
        return text + draw.choice((b"=", b"==", b"A", b"\n", b" "))
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    return text[:-1] + bytes([draw.choice(alphabet)])


def read_base64(text: bytes) -> bytes | None:
    """What base64 of either alphabet stands for, or None."""
    try:
        return base64.b64decode(text.replace(b"-", b"+").replace(b"_", b"/") + b"===")
    except ValueError:
        return None

"""Finds damage in the write-ahead log of a SQLite file, before SQLite opens it.

SQLite ends a log at the first frame that does not check out, and takes all behind it for the torn
end of a write. Where each commit is synced that is one commit at most, which nobody was told of.
More commits behind a broken frame were acknowledged once, and would be forgotten without a word.
(The format is that of https://www.sqlite.org/fileformat2.html, section 4.)
"""

import struct
from collections.abc import Iterator

_HEADER_BYTES = 32
_FRAME_HEADER_BYTES = 24
_ORDERS = {0x377F0682: "<", 0x377F0683: ">"}
_SUMMED = slice(0, 8)
_SALTS = slice(8, 16)
_SUM = slice(16, 24)
_MASK = 0xFFFFFFFF

Sum = tuple[int, int]


def lost_commits(path: str) -> int:
    """Counts the commits that SQLite would pass over when it opens the file at `path`.

    More than one is damage if each commit was synced.
    """
    log = _read(f"{path}-wal")
    header = log[:_HEADER_BYTES]
    if len(header) < _HEADER_BYTES:
        return 0
    magic, _, page_bytes = struct.unpack(">III", header[:12])
    salts, lost = header[16:24], 0
    order = _ORDERS.get(magic, ">")
    total = _sum(header[:24], order, (0, 0))
    sound = magic in _ORDERS and struct.unpack(">II", header[24:]) == total
    for head, page in _frames(log, page_bytes):
        if sound:
            total = _sum(page, order, _sum(head[_SUMMED], order, total))
            sound = head[_SALTS] == salts and struct.unpack(">II", head[_SUM]) == total
        is_commit = head[4:8] != bytes(4)
        if not sound and is_commit and head[_SALTS] == salts:
            lost += 1
    return lost


def _read(path: str) -> bytes:
    """Reads one round of the log: another process may just begin the next at its start."""
    try:
        with open(path, "rb") as log:
            while True:
                found = log.read()
                log.seek(0)
                if log.read(_HEADER_BYTES) == found[:_HEADER_BYTES]:
                    return found
                log.seek(0)
    except FileNotFoundError:
        return b""


def _frames(log: bytes, page_bytes: int) -> Iterator[tuple[bytes, bytes]]:
    if not 512 <= page_bytes <= 65536:
        return
    size = _FRAME_HEADER_BYTES + page_bytes
    for start in range(_HEADER_BYTES, len(log) - size + 1, size):
        middle = start + _FRAME_HEADER_BYTES
        yield log[start:middle], log[middle : start + size]


def _sum(part: bytes, order: str, total: Sum) -> Sum:
    """Continues the log's running checksum over a part of it."""
    one, two = total
    for left, right in struct.iter_unpack(f"{order}II", part):
        one = (one + left + two) & _MASK
        two = (two + right + one) & _MASK
    return one, two

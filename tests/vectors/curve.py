"""The arithmetic of Ed25519 in the open, to make signatures that no library would make.

Plain and slow, from RFC 8032. It exists so that edge signatures can stand over real vouchers:
`edge_signatures` gives every way we know in which verifiers of the world disagree.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

PRIME = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493
_D = -121665 * pow(121666, -1, PRIME) % PRIME
_ROOT = pow(2, (PRIME - 1) // 4, PRIME)


class Point(NamedTuple):
    """An affine point of the curve."""

    x: int
    y: int


ZERO = Point(0, 1)


def add(left: Point, right: Point) -> Point:
    """Adds two points; the formula of this curve has no exceptions."""
    x1, y1, x2, y2 = *left, *right
    cross = _D * x1 * x2 * y1 * y2 % PRIME
    x = (x1 * y2 + x2 * y1) * pow(1 + cross, -1, PRIME)
    y = (y1 * y2 + x1 * x2) * pow(1 - cross, -1, PRIME)
    return Point(x % PRIME, y % PRIME)


def multiply(scalar: int, point: Point) -> Point:
    """Adds a point to itself so many times."""
    total = ZERO
    while scalar:
        if scalar & 1:
            total = add(total, point)
        point, scalar = add(point, point), scalar >> 1
    return total


def encode(point: Point) -> bytes:
    """The canonical 32 bytes of a point."""
    return (point.y | (point.x & 1) << 255).to_bytes(32, "little")


def lift(y: int, sign: int) -> Point:
    """The point with this y and this parity of x; raises `ValueError` if there is none."""
    square = (y * y - 1) * pow(_D * y * y + 1, -1, PRIME) % PRIME
    x = pow(square, (PRIME + 3) // 8, PRIME)
    if (x * x - square) % PRIME:
        x = x * _ROOT % PRIME
    if (x * x - square) % PRIME:
        raise ValueError("there is no such point")
    return Point(PRIME - x if x & 1 != sign else x, y)


BASE = lift(4 * pow(5, -1, PRIME) % PRIME, 0)
# Any point, cleared of its large part, lies in the torsion subgroup; this one generates it.
_EIGHTH = next(
    point
    for point in (multiply(ORDER, add(BASE, lift(y, 0))) for y in (3, 4, 5, 6, 10, 15))
    if multiply(4, point) != ZERO
)
TORSION = [multiply(number, _EIGHTH) for number in range(8)]
"""The eight points of small order; the first is the neutral one."""


def other_spellings() -> list[bytes]:
    """Encodings that are not canonical: y of the prime or more, and x = 0 with a sign bit."""
    large = [y | sign << 255 for y in range(PRIME, 2**255) for sign in (0, 1)]
    signed_zero = [1 | 1 << 255, PRIME - 1 | 1 << 255]
    return [number.to_bytes(32, "little") for number in (*large, *signed_zero)]


class Signer:
    """A key whose every step of signing can be bent."""

    def __init__(self, seed: bytes, twist: Point = ZERO) -> None:
        """`twist` is added to the public key: a point of small order makes it a mixed one."""
        digest = hashlib.sha512(seed).digest()
        self.scalar = int.from_bytes(digest[:32], "little") & (1 << 254) - 8 | 1 << 254
        self.public = encode(add(multiply(self.scalar, BASE), twist))

    def challenge(self, r: bytes, message: bytes) -> int:
        """The hash that binds R, key and message."""
        digest = hashlib.sha512(r + self.public + message).digest()
        return int.from_bytes(digest, "little") % ORDER

    def finish(self, r: bytes, nonce: int, message: bytes) -> bytes:
        """Completes a signature whose R is spelt `r` and has the large part nonce times BASE."""
        s = (nonce + self.challenge(r, message) * self.scalar) % ORDER
        return r + s.to_bytes(32, "little")


def edge_signatures(seed: bytes, message: bytes) -> Iterator[tuple[str, bytes]]:
    """Signatures over a message, by a proper key, that some verifier of the world accepts."""
    signer, nonce = Signer(seed), 2**200 + 9
    r = multiply(nonce, BASE)
    proper = signer.finish(encode(r), nonce, message)
    s = int.from_bytes(proper[32:], "little")
    for number in range(1, (2**256 - s) // ORDER + 1):
        yield f"S + {number} L", proper[:32] + (s + number * ORDER).to_bytes(32, "little")
    for number, small in enumerate(TORSION[1:], 1):
        yield f"R with torsion {number}", signer.finish(encode(add(r, small)), nonce, message)
    for number, small in enumerate(TORSION):
        yield f"R of small order {number}", signer.finish(encode(small), 0, message)
    for spelling in other_spellings():
        yield (
            f"R spelt {spelling.hex()[:4]}..{spelling.hex()[-2:]}",
            signer.finish(spelling, 0, message),
        )
    for number, small in enumerate(TORSION):
        yield f"S of 0, R of small order {number}", encode(small) + bytes(32)
        yield f"S of L, R of small order {number}", encode(small) + ORDER.to_bytes(32, "little")
    yield "R with its sign flipped", proper[:31] + bytes([proper[31] ^ 0x80]) + proper[32:]
    yield "S negated", proper[:32] + (ORDER - s).to_bytes(32, "little")

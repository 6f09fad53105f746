"""Verifies a chain, item by item, and says what is wrong with the first item that is.

Pure. What is proven: nothing was changed, left out or put in between the opening and the end; every
checkpoint was signed by a key of this escrow for just this chain; and whatever an older export or
checkpoint remembers is still there as it was.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping

from x402mw.core.checkpoints import open_checkpoint, open_key_proof
from x402mw.core.errors import TokenRefused, UnknownKey
from x402mw.core.strict import b64url_decode
from x402mw.escrow.audit.items import FORMAT, End, Item, Link, Opening, Point
from x402mw.escrow.books import GENESIS, hash_text

UNSIGNED_ENTRIES_MAX = 1000
UNSIGNED_SECONDS_MAX = 660
"""A service signs after so many entries, and ten minutes of news; a minute is for its own pace."""

_CREATED_AT = 4
"""Where the text of an entry says when it was written."""

_HASH = re.compile("[0-9a-f]{64}", re.ASCII)
Remembered = tuple[int, str]
"""That the chain had this hash at this entry."""


class Broken(Exception):
    """The chain is not what was written; the message names the first bad item."""


class Verifier:
    """Sees every item in order; raises `Broken` at the first that is wrong.

    `root_key` is the escrow's, from elsewhere; without it the books are believed about their own.
    `keys` are signing keys that are trusted beside those that the root key vouches for.
    """

    def __init__(
        self,
        root_key: bytes | None = None,
        keys: Mapping[str, bytes] | None = None,
        older: Iterable[Remembered] = (),
    ) -> None:
        self.entries = 0
        self.covered = 0
        self._root_key = root_key
        self._keys = dict(keys or {})
        self._memory = _Memory(older)
        self._opening: Opening | None = None
        self._seq, self._hash = 0, GENESIS
        self._ended = False
        self._newest = ""
        self._first_unsigned = ""

    def see(self, item: Item) -> None:
        """The next item."""
        if self._ended or (self._opening is None) != isinstance(item, Opening):
            raise Broken("an export is one opening, entries and checkpoints, and one end")
        match item:
            case Opening():
                self._open(item)
            case Link():
                self._see_entry(item)
            case Point():
                self._see_checkpoint(item)
            case End():
                self._see_end(item)

    def finish(self) -> None:
        """There are no more items."""
        if not self._ended:
            raise Broken(f"the export was cut off after entry {self._seq}: it has no end")

    def check_signed(self) -> None:
        """Raises `Broken` if more stands unsigned at the end than a service leaves unsigned.

        Whoever takes checkpoints away and can compute hashes could have rewritten that much.
        """
        if not self._first_unsigned or self._opening is None:
            return
        first = max(self.covered, self._opening.since) + 1
        what = f"entries {first} to {self._seq} are not signed"
        if not (self.covered or self._opening.since):
            raise Broken(f"{what}, nor is any other: nothing tells whether they were rewritten")
        if self._seq - first >= UNSIGNED_ENTRIES_MAX:
            raise Broken(f"{what}, but one in {UNSIGNED_ENTRIES_MAX} should be")
        since, until = map(_written_at, (self._first_unsigned, self._newest))
        if until - since > UNSIGNED_SECONDS_MAX:
            told = f"{what}, though they took {until - since} seconds to be written"
            raise Broken(f"{told}: start the service, or find out who took its checkpoints")

    def _open(self, opening: Opening) -> None:
        if opening.format != FORMAT:
            raise Broken(f"this is no export of the form {FORMAT}")
        own = b64url_decode(opening.root_key, 32)
        if self._root_key not in (None, own):
            raise Broken("these are books of another root key")
        for number, proof in enumerate(opening.proofs, 1):
            try:
                kid, key = open_key_proof(proof, opening.network, own)
            except TokenRefused:
                raise Broken(f"the root key does not vouch for signing key {number}") from None
            self._keys[kid] = key
        if not _HASH.fullmatch(opening.previous_hash):
            raise Broken("the opening holds no hash")
        if opening.since == 0 and opening.previous_hash != GENESIS:
            raise Broken("entry 1 does not follow from nothing")
        self._opening = opening
        self._seq, self._hash = opening.since, opening.previous_hash
        self._memory.compare(self._seq, self._hash)

    def _see_entry(self, link: Link) -> None:
        seq = self._seq + 1
        if link.seq != seq:
            missing = (
                f"entry {seq} is missing" if link.seq > seq else f"entry {link.seq} comes twice"
            )
            raise Broken(missing)
        if link.previous_hash != self._hash:
            raise Broken(f"entry {seq} does not follow the one before it")
        if hash_text(link.text, self._hash, plain=link.form == 1) != link.hash:
            raise Broken(f"entry {seq} is not what was written")
        if not link.text.startswith(f"[{seq},"):
            raise Broken(f"entry {seq} says another number")
        self._seq, self._hash = seq, link.hash
        self._newest = link.text
        self._first_unsigned = self._first_unsigned or link.text
        self.entries += 1
        self._memory.compare(seq, link.hash)

    def _see_checkpoint(self, point: Point) -> None:
        name = f"the checkpoint at entry {point.seq}"
        if point.seq > self._seq:
            raise Broken(f"{name} is about an entry that is gone: the books end at {self._seq}")
        try:
            said = open_checkpoint(point.signature, self._keys)
        except UnknownKey:
            raise Broken(f"{name} is signed by a key that nobody vouches for") from None
        except TokenRefused:
            raise Broken(f"{name} is not signed as it should be") from None
        network = self._opening.network if self._opening else ""
        if (said.network, said.seq, said.created_at) != (network, point.seq, point.created_at):
            raise Broken(f"{name} was signed for something else")
        if (point.seq, point.hash, said.hash) != (self._seq, self._hash, self._hash):
            raise Broken(f"{name} was signed for another history: it was rewritten")
        self.covered = point.seq
        self._first_unsigned = ""

    def _see_end(self, end: End) -> None:
        if (end.seq, end.hash) != (self._seq, self._hash):
            raise Broken(f"the books end at entry {self._seq}, but should at {end.seq}")
        self._memory.finish(self._seq)
        self._ended = True


def _written_at(text: str) -> int:
    return int(json.loads(text)[_CREATED_AT])


class _Memory:
    """What is remembered from before, in the order of the chain."""

    def __init__(self, older: Iterable[Remembered]) -> None:
        self._older: Iterator[Remembered] = iter(older)
        self._next = next(self._older, None)
        self._compared = self._next is None

    def compare(self, seq: int, entry_hash: str) -> None:
        """Raises `Broken` if this entry is remembered otherwise."""
        while self._next is not None and self._next[0] <= seq:
            at, remembered = self._next
            if at == seq:
                self._compared = True
                if remembered != entry_hash:
                    raise Broken(f"entry {seq} is not the one remembered: history was rewritten")
            self._next = next(self._older, None)

    def finish(self, end: int) -> None:
        """Raises `Broken` if more is remembered than there is."""
        if self._next is not None:
            raise Broken(f"entry {self._next[0]} is remembered, but the books end at {end}")
        if not self._compared:
            raise Broken("what is remembered ends before this export begins: nothing compares")


def remember(items: Iterable[Item]) -> Iterator[Remembered]:
    """What an older export knows, in the order of the chain."""
    for item in items:
        if isinstance(item, Opening):
            if item.since:
                yield item.since, item.previous_hash
        else:
            yield item.seq, item.hash

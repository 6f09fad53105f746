"""All that the stories work on: one wallet's settings, its purse, and what it has learnt."""

import json
from collections.abc import Callable, Iterable
from typing import Any

from x402mw.core.amounts import ZERO, Atomic, parse_atomic, to_atomic
from x402mw.core.errors import ConfigurationError, Malformed, TokenRefused
from x402mw.core.keys import PUBLIC_KEY_BYTES, check_public_key
from x402mw.core.strict import b64url_decode, b64url_encode
from x402mw.core.tokens import KeySet, open_key_set
from x402mw.core.vouchers import network_id
from x402mw_client.events import Events
from x402mw_client.limits import Limits
from x402mw_client.memory import Memory
from x402mw_client.offers import LearntOffers, ProbeGate, normal_url, read_offer
from x402mw_client.operations import Operation
from x402mw_client.purse import Purse
from x402mw_client.records import EscrowKeys, EscrowRecord
from x402mw_client.sessions import Offer
from x402mw_client.waiting import Sections

BUFFER_BYTES = 1024 * 1024
RAM_SESSION_SECONDS = 3600
"""What only RAM remembers is lost with the process, so its money must come home soon."""


class WalletState:
    """One wallet's settings, purse and knowledge. `network_id` is empty until the escrow is known.

    The escrow's root key is pinned on first use, or given as `escrow_root`; from then on nothing
    signed by another key, whoever sends it, is believed.
    """

    def __init__(
        self,
        *,
        escrow: str,
        limits: Limits,
        deposit: str,
        memory: Memory,
        clock: Callable[[], float],
        escrow_root: str | None = None,
        aliases: Iterable[str] = (),
        buffer_limit: int = BUFFER_BYTES,
        events: Events,
        receipt_every: int | None = None,
        on_receipt: Callable[[Any], None] = lambda receipt: None,
    ) -> None:
        self.escrow = normal_url(escrow)
        self.escrows = frozenset({self.escrow, *map(normal_url, aliases)})
        self.deposit = to_atomic(deposit)
        self.buffer_limit = buffer_limit
        self.memory = memory
        self.clock = clock
        self.events = events
        self.on_receipt = on_receipt
        self.purse = Purse(limits, memory, clock, self._read_offer, events, receipt_every)
        self.signal = self.purse.signal
        self.sections = Sections(self.signal, memory)
        self.offers = LearntOffers()
        self.gate = ProbeGate()
        self.topups: dict[bytes, Operation[EscrowRecord]] = {}
        self.network, self.network_id, self.min_escrow = "", b"", ZERO
        self._root = None if escrow_root is None else _read_key(escrow_root)
        self.recall()
        self.purse.look()
        self.purse.recover()

    @property
    def session_seconds(self) -> int | None:
        """How long new sessions live; None leaves it to the escrow."""
        return RAM_SESSION_SECONDS if self.memory.path is None else None

    def pin(self, keys: EscrowKeys) -> None:
        """Believes the configured escrow's key set, now and ever after under the same root key."""
        root = self._root or check_public_key(keys.root_key)
        if keys.root_key != root:
            raise TokenRefused("the escrow shows another root key than the one that is pinned")
        key_set = open_key_set(keys.key_set, root)
        if self.network not in ("", key_set.network):
            raise TokenRefused("the escrow's network is not the one that is pinned")
        self.purse.change(lambda: self._pin(root, key_set), durable=True)
        self._believe(root, key_set.network, key_set.min_escrow)

    def _pin(self, root: bytes, key_set: KeySet) -> None:
        # Another process may have pinned meanwhile: then its word holds.
        if not self.recall():
            self.memory.set("escrow", self.escrow)
            self.memory.set("root", b64url_encode(root))
            self.memory.set("network", key_set.network)
            self.memory.set("min_escrow", str(key_set.min_escrow))
        elif root != self._root:
            raise TokenRefused("another process has pinned another root key")

    def _believe(self, root: bytes, network: str, min_escrow: Atomic) -> None:
        self._root, self.network, self.min_escrow = root, network, min_escrow
        self.network_id = network_id(network, root)

    def recall(self) -> bool:
        """Takes up what the file remembers of the escrow; tells whether there is anything."""
        known = self.memory.settings
        if "network" not in known:
            return False
        root = _read_key(known["root"])
        if known["escrow"] not in self.escrows or self._root not in (None, root):
            raise ConfigurationError("this wallet file belongs to another escrow")
        self._believe(root, known["network"], parse_atomic(known["min_escrow"]))
        return True

    def _read_offer(self, kept: str) -> Offer:
        if not self.network_id:
            self.recall()
        try:
            return read_offer(json.loads(kept), self.network, self.network_id)
        except (ValueError, Malformed) as error:
            raise ConfigurationError(f"the wallet file is damaged: {error}") from None


def _read_key(text: str) -> bytes:
    return check_public_key(b64url_decode(text, PUBLIC_KEY_BYTES))

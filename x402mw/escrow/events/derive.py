"""Which events an entry of the books is, and what is told about each. Pure.

An event is thin: it says that something happened and by how much, and whoever wants to know more
asks the API. Its id is the number of its entry (`812`, and `812.1` for the second event of one).
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from x402mw.core.amounts import Atomic, display
from x402mw.escrow.books import Entry
from x402mw.escrow.events.marks import ENDED, EXHAUSTED, LOW
from x402mw.escrow.rules.values import Transfer, agent_account

NAMES = (
    *("locked", "topped_up", "released", "refunded", "low_balance", "exhausted", "paused"),
    *("resumed", "closing", "closed", "expired", "disputed", "resolved", "revoked"),
    *("delivered", "rejected", "returned", "extended"),
)
PAUSE, RESUME = "pause", "resume"
REVOKED = "revoked"
REVOCATIONS = ("key_revoked", "agent_revoked")
_OF_KIND = {
    "lock": "locked",
    "top_up": "topped_up",
    PAUSE: "paused",
    RESUME: "resumed",
    "deliver": "delivered",
    "reject": "rejected",
    "return": "returned",
    "extend": "extended",
    "dispute": "disputed",
    "resolve": "resolved",
    "withdraw": "resolved",
    "undecided": "resolved",
    **dict.fromkeys((*REVOCATIONS, "revoke"), REVOKED),
}


class Told(NamedTuple):
    """One event: `part` counts the events of one entry, `parties` are who may know of it."""

    seq: int
    part: int
    name: str
    escrow_id: str
    parties: tuple[str, ...]
    body: str

    @property
    def id(self) -> str:
        """How receivers know it again."""
        return write_id(self.seq, self.part)


def write_id(seq: int, part: int) -> str:
    """The id of an event."""
    return f"{seq}.{part}" if part else str(seq)


def tell(entry: Entry, buyer: str | None, provider: str | None) -> list[Told]:
    """The events of an entry, for the parties of its escrow."""
    data = json.loads(entry.data) if entry.data else {}
    parties = _parties(entry, data, buyer, provider)
    if not parties:
        return []
    return [
        Told(
            *(entry.seq, part, name, entry.escrow_id or "", parties),
            json.dumps(_describe(entry, part, name, buyer, data), separators=(",", ":")),
        )
        for part, name in enumerate(_names(entry, buyer, data))
    ]


def _parties(
    entry: Entry, data: dict[str, Any], buyer: str | None, provider: str | None
) -> tuple[str, ...]:
    if buyer is not None and provider is not None:
        return buyer, provider
    if entry.kind in REVOCATIONS:
        return (str(data.get("agent_id", entry.actor)),)
    return ()


def _names(entry: Entry, buyer: str | None, data: dict[str, Any]) -> list[str]:
    found = [_OF_KIND[entry.kind]] if entry.kind in _OF_KIND else []
    ended = data.get(ENDED)
    if _moved(entry, buyer, _out):
        found.append("released")
    if _moved(entry, buyer, _back) and not ended:
        found.append("refunded")
    found += [name for name in (LOW, EXHAUSTED) if data.get(name)]
    if entry.kind in ("buyer_close", "revoke") and not ended:
        found.append("closing")
    if str(ended).startswith("expired"):
        found.append("expired")
    return [*found, "closed"] if ended else found


Direction = Callable[[Transfer, str, str], bool]


def _in(move: Transfer, account: str, _buyer: str) -> bool:
    return move.target == account


def _out(move: Transfer, account: str, buyer: str) -> bool:
    return move.source == account and move.target != buyer


def _back(move: Transfer, account: str, buyer: str) -> bool:
    return move.source == account and move.target == buyer


def _beside(move: Transfer, account: str, buyer: str) -> bool:
    return move.source != account and move.target == buyer


def _moved(entry: Entry, buyer: str | None, which: Direction) -> int:
    if entry.escrow_id is None or buyer is None:
        return 0
    account, home = f"escrow:{entry.escrow_id}", agent_account(buyer)
    return sum(move.amount for move in entry.transfers if which(move, account, home))


_DIRECTIONS: dict[str, Sequence[Direction]] = {
    **dict.fromkeys(("locked", "topped_up"), (_in,)),
    "released": (_out,),
    "resolved": (_out, _back),
    "returned": (_beside,),
    **dict.fromkeys(("refunded", "closed", "expired"), (_back,)),
}


def _describe(
    entry: Entry, part: int, name: str, buyer: str | None, data: dict[str, Any]
) -> dict[str, Any]:
    moved = sum(_moved(entry, buyer, which) for which in _DIRECTIONS.get(name, ()))
    return {
        "id": write_id(entry.seq, part),
        "type": name,
        "escrow_id": entry.escrow_id,
        "at": entry.created_at,
        "effective_at": entry.effective_at,
        "amount": display(Atomic(moved)),
        "kind": entry.kind,
        "data": data,
    }

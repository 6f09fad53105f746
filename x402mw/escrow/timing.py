"""What entries say of the times of an escrow, and where its row says something else (I20).

Pure. Who moves a deadline in the database has the service itself move the money, so a row's status
and when it is due follow from the rest of what there is, and no deadline counts before it was.
"""

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from x402mw.escrow.rules import session, step
from x402mw.escrow.rules.agreement import Agreement, Dispute, Part, PartState
from x402mw.escrow.rules.table import Event
from x402mw.escrow.rules.values import Escrow, Phase

if TYPE_CHECKING:
    from x402mw.escrow.books import Entry

_DEADLINE = Event.DEADLINE.value
_CLOSING = (Event.BUYER_CLOSE.value, Event.REVOKE.value)
_ENDING = (Event.PROVIDER_CLOSE.value, _DEADLINE)

UNSAID = 0
"""The closing deadline of a session whose entries are older than such words."""


class Said:
    """What its entries say of one escrow beside its money. There may be very many: kept small.

    `phase` and `closing` are those of a session; a manual escrow has neither.
    """

    __slots__ = ("carry", "claim_until", "closing", "expires_at", "phase", "terms")

    def __init__(self) -> None:
        self.terms: str | None = None
        self.expires_at: int | None = None
        self.claim_until: int | None = None
        self.closing: int | None = None
        self.carry: str | None = None
        self.phase = Phase.OPEN

    def see(self, entry: "Entry", data: Mapping[str, Any]) -> Iterator[str]:
        """The next entry about it."""
        for name in data.keys() & {"terms", "expires_at", "claim_until", "carry"}:
            setattr(self, name, data[name])
        if "closing_deadline" in data:
            self.closing = data["closing_deadline"]
            if self.closing < (self.claim_until or 0):
                yield f"I20 entry {entry.seq} closes before vouchers were good until"
        elif entry.kind in _CLOSING or (entry.kind == _DEADLINE and _is_by_hand(entry)):
            self.closing = UNSAID
        if entry.kind == _DEADLINE and entry.effective_at < self._earliest():
            yield f"I20 entry {entry.seq} counts before the deadline of its escrow"
        if entry.kind in _ENDING:
            # Nothing is asked any more of when its vouchers were good.
            self.phase, self.claim_until = Phase.ENDED, None
        elif entry.kind in _CLOSING:
            self.phase = Phase.CLOSING

    def _earliest(self) -> int:
        """From when time may end it, as far as that was said."""
        return (self.expires_at or 0) if self.closing is None else self.closing

    def check(self, escrow: Escrow) -> Iterator[str]:
        """Its row, of either kind."""
        if self.expires_at not in (None, escrow.expires_at):
            yield f"I20 {escrow.escrow_id} ends at another time than its entries say"

    def check_session(self, escrow: Escrow) -> Iterator[str]:
        """The row of a session, whose status and due time follow from its phase."""
        name, closing = escrow.escrow_id, escrow.closing_deadline
        # The oldest books entered only what moved money.
        phase = escrow.phase if self.terms is None else self.phase
        known = self.closing or (self.closing is None and self.terms)
        if known and closing != self.closing:
            yield f"I20 {name} closes at another time than its entries say"
        if (escrow.claim_until or 0) < (self.claim_until or 0):
            yield f"I20 {name} has vouchers that are good for less than its entries say"
        deadline = closing or escrow.expires_at
        follows = session.standing(phase, escrow.released, escrow.amount, deadline)
        yield from _check_standing(escrow, follows)

    def check_agreement(
        self, escrow: Escrow, row: Mapping[str, Any], parts: list[Part], opened: Dispute | None
    ) -> Iterator[str]:
        """The rows of a manual escrow: what stands open makes its status and its due time."""
        name = escrow.escrow_id
        if self.carry not in (None, row["carry"]):
            yield f"I20 {name} carries another fraction than its entries say"
        if escrow.closing_deadline is not None or escrow.claim_until is not None:
            yield f"I20 {name} has times that only a session has"
        try:
            states = tuple(part._replace(state=PartState(part.state)) for part in parts)
            carry, review = Fraction(row["carry"]), row["review_seconds"]
            follows = step.standing(Agreement(escrow, states, carry, review, opened))
        except (ValueError, ArithmeticError):
            yield f"I20 {name} consists of what can not be"
        else:
            yield from _check_standing(escrow, follows)


def _check_standing(escrow: Escrow, follows: tuple[str, int | None]) -> Iterator[str]:
    """A status, and when time does something next, against what follows from all the rest."""
    status, due_at = follows
    if (escrow.status, escrow.due_at) != follows:
        stands = f"{escrow.status} and due at {escrow.due_at}"
        yield f"I20 {escrow.escrow_id} is {stands}, but ought to be {status}, due at {due_at}"


def _is_by_hand(entry: "Entry") -> bool:
    """Whether a buyer closed when nothing could be redeemed any more: not time ended it."""
    return entry.actor is not None or entry.plain

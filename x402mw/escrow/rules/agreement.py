"""What a manual escrow is: its parts, its dispute, and what each of them holds.

Parts are the milestones; an escrow without any has one part, number 0, that is all of it.
"""

from enum import Enum
from fractions import Fraction
from typing import NamedTuple

from x402mw.core.amounts import Atomic
from x402mw.escrow.rules.values import Escrow

WHOLE = 0
"""The number of the one part of an escrow without milestones."""


class PartState(Enum):
    """How far a milestone is."""

    PENDING = "pending"
    DELIVERED = "delivered"
    REJECTED = "rejected"
    PAID = "paid"


class Part(NamedTuple):
    """A milestone. `amount` is what it is worth (of part 0: all that is free at the time).

    `review_until` is when a delivery that nobody answered is paid, None if never.
    """

    number: int
    name: str
    amount: Atomic
    state: PartState = PartState.PENDING
    proof: str = ""
    review_until: int | None = None


class Dispute(NamedTuple):
    """An open dispute over D of the escrow; `part` is the milestone it is about, if one.

    `raised` says that it took the place of one that the other party had opened over less.
    """

    number: int
    opener: str
    part: int | None
    opened_at: int
    deadline: int
    raised: bool = False


class Agreement(NamedTuple):
    """A manual escrow with all that its two kinds of columns do not hold.

    `carry` (0 <= carry < 1) is what was released below a whole unit, in units.
    """

    escrow: Escrow
    parts: tuple[Part, ...]
    carry: Fraction = Fraction(0)
    review_seconds: int | None = None
    dispute: Dispute | None = None

    @property
    def done(self) -> list[Part]:
        """What was delivered, rejected or not, and not yet paid."""
        states = (PartState.DELIVERED, PartState.REJECTED)
        return [part for part in self.parts if part.state in states]

    @property
    def claimed(self) -> int:
        """What is done, of what is free: the buyer alone may not take it back (requirement X24)."""
        parts = [part for part in self.done if not self.holds(part)]
        return min(self.escrow.free, sum(map(self.worth, parts)))

    @property
    def reviewed(self) -> list[Part]:
        """The deliveries that are paid unless somebody answers in time."""
        return [
            part
            for part in self.parts
            if part.state is PartState.DELIVERED
            and part.review_until is not None
            and not self.holds(part)
        ]

    def holds(self, part: Part) -> bool:
        """Whether the open dispute is about this part; its clock stands still."""
        return self.dispute is not None and self.dispute.part == part.number

    def waits(self, part: Part) -> bool:
        """Whether the review of a part ends no sooner than the dispute over some of its money.

        Paid before, it would be called paid with less than it is worth.
        """
        if self.dispute is None:
            return False
        return part.number == WHOLE or part.amount > self.escrow.free

    def worth(self, part: Part) -> int:
        """What a part is paid with: its amount, or all that is free."""
        return self.escrow.free if part.number == WHOLE else part.amount

    def find(self, number: int) -> Part:
        """The part with this number; raises `KeyError`."""
        return {part.number: part for part in self.parts}[number]

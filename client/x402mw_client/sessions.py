"""What a buyer remembers of its sessions, and the arithmetic on it. No I/O and no clock.

1. `charged + held <= cumulative <= deposit`: what is signed never exceeds what is locked.
2. A signed call is *held* at the largest of its forms until its charge is known for certain.
3. One logical request has one seq; every form signed for it keeps that seq.
4. Nothing falls but `held`; a charge never exceeds what the call held.
"""

import json
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from x402mw.core import ids
from x402mw.core.amounts import ZERO, Atomic
from x402mw.core.keys import secret_key
from x402mw.core.strict import dumps
from x402mw.core.terms import Terms
from x402mw.core.tokens import SessionToken, peek_session_token
from x402mw.core.vouchers import SignedVoucher

SKEW_MS = 120_000
"""A provider may admit a voucher this long after its `expires`."""
LAST_SECONDS = 600
"""A session takes no new calls this long before it ends at the escrow."""
RENEW_SECONDS = 180
"""A token is renewed this long before it expires."""


_peek = lru_cache(maxsize=256)(peek_session_token)


class Stale(Exception):
    """The session cannot take this call as it stands: look for cover, or for another session."""


class State(StrEnum):
    """Where a session stands for its buyer.

    `ended` takes no new calls; `differs` is signed for no more, the two accounts do not agree.
    """

    OPEN = "open"
    ENDED = "ended"
    DIFFERS = "differs"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Past:
    """What the sessions that are over and forgotten have cost, and may have cost at worst."""

    charged: Atomic = ZERO
    worst: Atomic = ZERO


@dataclass(frozen=True)
class Offer:
    """Terms that a provider offered, and its very words for them."""

    terms: Terms
    accepts: dict[str, Any]
    suggested: Atomic = ZERO

    @cached_property
    def accepted(self) -> bytes:
        """Its words as JSON, as every payment repeats them."""
        return dumps(self.accepts)


class Subject(NamedTuple):
    """The request that a signature is for; `body_hash` None leaves the body unbound."""

    method: str
    origin: str
    target: str
    body_hash: bytes | None
    url: str


@dataclass(frozen=True, slots=True)
class Form:
    """One signed voucher for a call. `expires` is in milliseconds."""

    signed: SignedVoucher = field(repr=False)
    offer: Offer
    binding: int
    expires: int


@dataclass(slots=True)
class Paid:
    """What one call cost, in atomic units: at most `amount`; `charge` once the figure is final.

    Of an answer that streams the figure is known when its body has ended; until then, and for as
    long as the provider cannot be asked, `charge` is None.
    """

    url: str
    session: str
    seq: int
    amount: int = 0
    charge: int | None = None


@dataclass(slots=True, eq=False)
class Call:
    """One logical request that was signed for. `hold` is the largest amount of its forms.

    `url` has no query, which may hold secrets. `in_flight`: somebody waits for its answer.
    `charge` is set once it is settled; then nothing is ever signed for it again.
    """

    session: "Session"
    seq: int
    url: str
    hold: Atomic = ZERO
    expires: int = 0
    forms: list[Form] = field(default_factory=list)
    in_flight: bool = True
    charge: Atomic | None = None
    paid: Paid = field(init=False)

    def __post_init__(self) -> None:
        """What the caller is told of it, from now on."""
        self.paid = Paid(self.url, self.session.name, self.seq)

    def form_of(self, commitment: str) -> Form | None:
        """The form with this commitment id, if we ever signed it."""
        return next((form for form in self.forms if form.signed.commitment_id == commitment), None)

    def dead(self, now: float) -> bool:
        """Whether no provider may admit any form of this call any more."""
        return now * 1000 > self.expires + SKEW_MS


@dataclass(eq=False)
class Session:
    """A funded relation with one provider, reached at one origin. Amounts are atomic units.

    `target` is what a top-up fills the rest up to. `held` is the sum of the holds of all calls, of
    this process (`calls`) and of others, plus `unattributed`: what the provider reported open when
    we had lost our memory. `total_seen` is the largest `chargedTotal` of any settled answer. A
    session read back from a file is not `proven` until the provider has answered: the file may be
    an old copy, which one call alone finds out. `doubtful` are the calls that nobody waits for.
    `receipt` is the provider's newest, and `unreceipted` the charged calls since one was asked for.
    """

    id: bytes
    origin: str
    offer: Offer
    seed: bytes = field(repr=False)
    token: str = field(repr=False)
    target: Atomic
    deposit: Atomic
    expires_at: int
    cumulative: Atomic = ZERO
    charged: Atomic = ZERO
    held: Atomic = ZERO
    unattributed: Atomic = ZERO
    total_seen: Atomic = ZERO
    state: State = State.OPEN
    calls: dict[int, Call] = field(default_factory=dict, repr=False)
    doubtful: dict[int, Call] = field(default_factory=dict, repr=False)
    proven: bool = True
    unreceipted: int = 0
    receipt: str = field(default="", repr=False)
    topup_after: float = 0.0
    renew_after: float = 0.0
    asked_at: float = 0.0
    ask_after: float = 0.0

    @cached_property
    def secret(self) -> bytes:
        """The 64-byte signing key of this session."""
        return secret_key(self.seed)

    @cached_property
    def name(self) -> str:
        """The session's id as it is written."""
        return ids.format_id(ids.ESCROW, self.id)

    @cached_property
    def key(self) -> tuple[str, str, bytes]:
        """What calls it may pay for."""
        return session_key(self.origin, self.offer.terms)

    @property
    def spent(self) -> int:
        """What this session has cost, at worst."""
        return self.charged + self.held

    def at_worst(self, now: float) -> int:
        """What this session may come to, whatever its provider does with what was signed.

        Where no more is signed, headroom that refused and cheaper calls left is never used up.
        """
        return self.spent if self.takes_calls(now) else max(self.spent, self.cumulative)

    @property
    def rest(self) -> int:
        """What of the deposit is neither charged nor held."""
        return self.deposit - self.spent

    def opened_token(self) -> SessionToken:
        """What the current token says."""
        return _peek(self.token)

    def takes_calls(self, now: float) -> bool:
        """Whether a new call may be signed in this session."""
        return self.state is State.OPEN and now < self.expires_at - LAST_SECONDS

    def held_by(self, call: Call | None) -> int:
        """What a call holds now."""
        return call.hold if call is not None and call.seq in self.calls else 0

    def keep(self, call: Call, amount: int, expires: int) -> None:
        """Looks after a call that holds `amount` now; it can be admitted until `expires`."""
        call.hold = call.paid.amount = Atomic(amount)
        call.expires = max(call.expires, expires)
        self.calls[call.seq] = call

    def forget(self, call: Call) -> None:
        """Looks after a call no longer; what it held is for the books to lower."""
        self.calls.pop(call.seq, None)
        self.doubtful.pop(call.seq, None)

    def busy(self, call: Call | None) -> bool:
        """Whether a call of this process other than this one is on its way."""
        return any(other.in_flight and other is not call for other in self.calls.values())


@dataclass(frozen=True, slots=True)
class Opening:
    """A session that the escrow was asked for, and all that it takes to ask for the very same.

    Remembered before the request leaves: sent again under its `key` (the idempotency key) it finds
    the session that an earlier sending opened, so a crash or a lost answer strands no money.
    """

    key: str
    origin: str
    offer: Offer
    seed: bytes = field(repr=False)
    amount: Atomic
    target: Atomic
    seconds: int | None

    @property
    def pays_for(self) -> tuple[str, str, bytes]:
        """What calls the session may pay for (`session_key`)."""
        return session_key(self.origin, self.offer.terms)


def session_key(origin: str, terms: Terms) -> tuple[str, str, bytes]:
    """A session serves one provider's journal, at the one origin where it was offered."""
    return origin, terms.pay_to, terms.journal


def deposit_target(amount: int, suggested: int, least: int, most: int) -> Atomic:
    """What to lock for calls of `amount`: a hundred of them, or what the provider suggests."""
    return Atomic(min(max(least, suggested, 100 * amount), most))


def newer_token(session: Session, token: str | None, now: float) -> str:
    """The token to pay with from now on.

    Answers overtake each other: one for less than ours, while ours lives, is from before a top-up.
    """
    old = session.opened_token()
    if token is None or (_peek(token).deposit < old.deposit and now < old.exp):
        return session.token
    return token


def as_text(offer: Offer) -> str:
    """Writes an offer for the wallet's file."""
    return json.dumps(offer.accepts, separators=(",", ":"))

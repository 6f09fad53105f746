"""Claims and journals for tests of the provider's journal. Nothing here is random."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.support.payments import BOOK, NOW, TOKEN, Payment, offer_of
from x402mw.core import gate
from x402mw.core.amounts import Atomic
from x402mw.provider.journal import Admitted, Journal

CREDENTIALS = hashlib.sha256(b"").digest()
AT_EASE = gate.Standing(unredeemed_max=Atomic(10_000_000))


class Clock:
    """A clock that moves only when told to, in seconds."""

    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def claim_of(payment: Payment) -> gate.Claim:
    """The claim of a payment whose token and signature are taken as verified."""
    signed = payment.signed
    return gate.Claim(
        signed=signed,
        commitment=hashlib.sha256(signed.raw).digest(),
        token=replace(payment.token, session=payment.session),
        terms=payment.terms,
        binding=payment.binding,
        expires=payment.expires,
    )


def claim(seq: int = 1, *, cumulative: int = 1_000_000, **changes: Any) -> gate.Claim:
    """A claim on the test session; `changes` are fields of `Payment`."""
    return claim_of(Payment(seq=seq, cumulative=cumulative, **changes))


def session_id(number: int) -> bytes:
    """The id of the numbered session."""
    return number.to_bytes(16, "big")


async def admit(
    journal: Journal,
    what: gate.Claim,
    *,
    book: gate.Book = BOOK,
    standing: Callable[[Atomic], gate.Standing] = lambda unredeemed: AT_EASE,
    credentials: bytes = CREDENTIALS,
) -> Admitted | gate.Outcome:
    """Asks the journal to admit a claim, under the offer it was made for."""
    return await journal.admit(
        what,
        offer=offer_of(what.terms),
        book=book,
        standing=standing,
        credentials=credentials,
    )


async def admitted(journal: Journal, what: gate.Claim) -> Admitted:
    """Admits a claim that must be admitted."""
    call = await admit(journal, what)
    assert isinstance(call, Admitted)
    return call


def outcome(body: bytes = b"answer") -> gate.Outcome:
    """An answer to keep."""
    return gate.Outcome(200, ((b"content-type", b"text/plain"),), body, CREDENTIALS)


assert TOKEN.deposit == 1_000_000

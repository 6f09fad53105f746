"""What can be asked about manual escrows: lock, release by share, milestones, refunds, disputes.

Values as in `operations`. The buyer locks and pays; the provider delivers and may give back; either
may dispute; an arbiter decides.
"""

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any, TypeAlias

from x402mw.core.amounts import Atomic
from x402mw.core.errors import LocalError
from x402mw.core.strict import b64url_encode
from x402mw_client.operations import (
    API,
    AnyEscrow,
    Listing,
    Money,
    Operation,
    Progress,
    Steps,
    given,
    move,
    path_of,
    status,
    write_amount,
    write_whole,
)
from x402mw_client.records import CaseRecord, DisputeRecord, EscrowRecord, Outcome, Page

HOUR_SECONDS = 3600
_BOUNDLESS = re.compile(r"[eE][+-]?[0-9_]{4}")
Number: TypeAlias = str | int | float | Decimal | Fraction
"""A plain number that is no money: a share, a score, hours. Read as it is written: 0.7 is 7/10."""

PERFORMANCE_TIERS = (("0.9", 1), ("0.7", "0.7"))
"""From which score on which share is paid (P6); below the last of them nothing is."""


def read_number(value: Number) -> Fraction:
    """A number exactly as it is written, or `LocalError`."""
    text = str(value)
    # A score may come from a stranger, and millions of digits would take minutes to expand.
    if _BOUNDLESS.search(text):
        raise LocalError("a number has an exponent of at most three digits")
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise LocalError(f"{value!r} is no number") from None


# Locking.


def lock(
    to: str,
    amount: Money,
    memo: str = "",
    auto_hours: Number | None = None,
    *,
    auto_release_seconds: int | None = None,
    expires_in_seconds: int | None = None,
    on_expiry: str | None = None,
    review_seconds: int | None = None,
    milestones: Mapping[str, Money] | None = None,
    payees: Mapping[str, str] | None = None,
    outcome_sha256: str | None = None,
    oracle_key: bytes | None = None,
    referral_code: str | None = None,
    low_balance: Money | None = None,
    key: str | None = None,
) -> Operation[EscrowRecord]:
    """Locks money for the agent `to`, to be released by hand.

    It ends after `auto_hours` or `auto_release_seconds`, and the rest goes to the provider; or
    after `expires_in_seconds` (default: 30 days), and the rest comes back; `on_expiry` ("release"
    or "refund") says otherwise. A delivery that nobody answers for `review_seconds` is paid.
    `milestones` are amounts by their names, `payees` the fractions ("0.7") of agents that share
    what is earned. Whoever presents the outcome with `outcome_sha256` (hex), or one that
    `oracle_key` signed, has the money released. `referral_code` names who gets a part of the fee.
    At `low_balance` or below (default: a tenth of `amount`) the parties are told so, once.
    """
    condition = given(
        sha256=outcome_sha256, oracle_key=None if oracle_key is None else b64url_encode(oracle_key)
    )
    body = {
        "to_agent_id": to,
        "amount": write_whole(amount),
        "memo": memo,
        **_lifetime(auto_hours, auto_release_seconds, expires_in_seconds),
        **given(on_expiry=on_expiry, review_seconds=review_seconds, referral_code=referral_code),
        **given(low_balance=None if low_balance is None else write_whole(low_balance)),
        **({"milestones": _milestones(milestones)} if milestones else {}),
        **({"payees": _payees(payees)} if payees else {}),
        **({"condition": condition} if condition else {}),
    }
    return move(EscrowRecord, "/escrow", body, key)


def _lifetime(
    auto_hours: Number | None, auto_release_seconds: int | None, expires_in_seconds: int | None
) -> dict[str, int]:
    hours = None if auto_hours is None else _whole_seconds(auto_hours)
    if hours is not None and auto_release_seconds is not None:
        raise LocalError("give auto_hours or auto_release_seconds, not both")
    return given(
        auto_release_seconds=auto_release_seconds if hours is None else hours,
        expires_in_seconds=expires_in_seconds,
    )


def _whole_seconds(hours: Number) -> int:
    seconds = read_number(hours) * HOUR_SECONDS
    if seconds.denominator != 1:
        raise LocalError("the hours must come to whole seconds")
    return seconds.numerator


def _milestones(milestones: Mapping[str, Money]) -> list[dict[str, str]]:
    return [{"name": name, "amount": write_whole(worth)} for name, worth in milestones.items()]


def _payees(payees: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"agent_id": agent, "fraction": fraction} for agent, fraction in payees.items()]


def create_timed_escrow(
    amount: Money, provider: str, session_hours: Number, *, memo: str = "", key: str | None = None
) -> Operation[EscrowRecord]:
    """Locks money for some hours of service; at their end the provider gets what is left (C10)."""
    return lock(provider, amount, memo, session_hours, key=key)


# Paying.


def release_partial(
    escrow: AnyEscrow, amount: Money, memo: str = "", *, key: str | None = None
) -> Operation[EscrowRecord]:
    """Pays an amount more; what is finer than a unit is carried."""
    body = {"amount": write_amount(amount), "memo": memo}
    return move(EscrowRecord, path_of(escrow, "/release-partial"), body, key)


def settle(
    escrow: AnyEscrow, release: Money, refund: Money, *, key: str | None = None
) -> Operation[EscrowRecord]:
    """Pays one amount and takes another back, both or neither."""
    body = {"release": write_whole(release), "refund": write_whole(refund)}
    return move(EscrowRecord, path_of(escrow, "/settle"), body, key)


def settle_share(
    escrow: AnyEscrow, share: Number, *, key: str | None = None
) -> Steps[EscrowRecord]:
    """Pays a share (0 to 1) of all that is free, rounded down to the unit, and takes the rest back.

    Both happen in one step (X19). Where nothing is free any more nothing happens, so doing it
    again is harmless. What was delivered is not taken back: `EscrowRefused` (X24).
    """
    part = read_number(share)
    if not 0 <= part <= 1:
        raise LocalError("a share lies between 0 and 1")
    record: EscrowRecord = yield status(escrow)
    free = record.free
    if free == 0:
        return record
    paid = free * part.numerator // part.denominator
    settled: EscrowRecord = yield settle(escrow, Atomic(paid), Atomic(free - paid), key=key)
    return settled


def settle_performance(
    escrow: AnyEscrow,
    score: Number,
    tiers: Sequence[tuple[Number, Number]] = PERFORMANCE_TIERS,
    *,
    key: str | None = None,
) -> Steps[EscrowRecord]:
    """Pays by a score: the share of the highest tier it reaches, and takes the rest back (P6)."""
    return settle_share(escrow, performance_share(score, tiers), key=key)


def performance_share(
    score: Number, tiers: Sequence[tuple[Number, Number]] = PERFORMANCE_TIERS
) -> Fraction:
    """The share that a score has earned: that of the highest tier it reaches, else nothing."""
    reached = read_number(score)
    levels = [(read_number(least), read_number(share)) for least, share in tiers]
    return max((level for level in levels if level[0] <= reached), default=(0, Fraction(0)))[1]


# Taking and giving back.


def refund(
    escrow: AnyEscrow, amount: Money | None = None, memo: str = "", *, key: str | None = None
) -> Operation[EscrowRecord]:
    """Sends the buyer what is held, or so much of it.

    The buyer itself may take what is free and not under review, the provider may send all of it.
    """
    body = given(amount=None if amount is None else write_whole(amount), memo=memo)
    return move(EscrowRecord, path_of(escrow, "/refund"), body, key)


def return_money(
    escrow: AnyEscrow, amount: Money, memo: str = "", *, key: str | None = None
) -> Operation[EscrowRecord]:
    """The provider gives back of what it was paid, from its own account, also after the end."""
    body = {"amount": write_whole(amount), "memo": memo}
    return move(EscrowRecord, path_of(escrow, "/return"), body, key)


# Milestones and conditions. An escrow without milestones is one part, which needs no name.


def deliver(
    escrow: AnyEscrow, proof: str = "", *, milestone: str | None = None, key: str | None = None
) -> Operation[EscrowRecord]:
    """The provider says, with proof, that a part is done."""
    body = given(proof=proof, milestone=milestone)
    return move(EscrowRecord, path_of(escrow, "/deliver"), body, key)


def approve(
    escrow: AnyEscrow, milestone: str | None = None, *, reason: str = "", key: str | None = None
) -> Operation[EscrowRecord]:
    """The buyer pays a part, delivered or not."""
    body = given(milestone=milestone, reason=reason)
    return move(EscrowRecord, path_of(escrow, "/approve"), body, key)


def reject(
    escrow: AnyEscrow, milestone: str | None = None, *, reason: str = "", key: str | None = None
) -> Operation[EscrowRecord]:
    """The buyer does not take a delivery; the provider may deliver again."""
    body = given(milestone=milestone, reason=reason)
    return move(EscrowRecord, path_of(escrow, "/reject"), body, key)


def present_outcome(
    escrow: AnyEscrow, outcome: str, *, signature: bytes | None = None, key: str | None = None
) -> Operation[Outcome]:
    """Presents the outcome that was agreed on, with its oracle's signature if there is one."""
    written = None if signature is None else b64url_encode(signature)
    body = given(outcome=outcome, signature=written)
    return move(Outcome, path_of(escrow, "/condition"), body, key)


# Disputes.


def dispute(
    escrow: AnyEscrow,
    reason: str,
    *,
    amount: Money | None = None,
    milestone: str | None = None,
    evidence: str = "",
    key: str | None = None,
) -> Operation[EscrowRecord]:
    """Holds an amount, a milestone, or all that is free back until an arbiter decides."""
    body: dict[str, Any] = given(
        reason=reason,
        evidence=evidence,
        milestone=milestone,
        amount=None if amount is None else write_whole(amount),
    )
    return move(EscrowRecord, path_of(escrow, "/dispute"), body, key)


def add_evidence(
    escrow: AnyEscrow, content: str, *, key: str | None = None
) -> Operation[EscrowRecord]:
    """Adds what a party has to say to the open dispute."""
    return move(EscrowRecord, path_of(escrow, "/dispute/evidence"), {"content": content}, key)


def withdraw_dispute(escrow: AnyEscrow, *, key: str | None = None) -> Operation[EscrowRecord]:
    """Takes a dispute back; only who opened it may."""
    return move(EscrowRecord, path_of(escrow, "/dispute/withdraw"), {}, key)


def resolve_dispute(
    escrow: AnyEscrow,
    to_provider: Money,
    to_buyer: Money,
    reason: str = "",
    *,
    key: str | None = None,
) -> Operation[EscrowRecord]:
    """An arbiter decides: both shares together are all that is disputed."""
    body = {
        "to_provider": write_whole(to_provider),
        "to_buyer": write_whole(to_buyer),
        "reason": reason,
    }
    return move(EscrowRecord, path_of(escrow, "/dispute/resolve"), body, key)


def list_disputes(
    *, limit: int | None = None, after: str | None = None
) -> Operation[Page[DisputeRecord]]:
    """Fetches a page of the open disputes, oldest first; for arbiters."""
    query = given(limit=limit, after=after)
    return Operation(Page[DisputeRecord], "GET", f"{API}/disputes", query=query)


def iter_disputes(
    *, page_items: int | None = None, progress: Progress | None = None
) -> Listing[DisputeRecord]:
    """Goes through all open disputes, oldest first; for arbiters."""
    return Listing(lambda after: list_disputes(limit=page_items, after=after), progress)


def list_cases(
    escrow: AnyEscrow, *, limit: int | None = None, after: str | None = None
) -> Operation[Page[CaseRecord]]:
    """Fetches a page of an escrow's disputes with all evidence, newest first."""
    query = given(limit=limit, after=after)
    return Operation(Page[CaseRecord], "GET", API + path_of(escrow, "/disputes"), query=query)

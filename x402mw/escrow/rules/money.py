"""Money in an escrow: fee, referral, revenue split, and what moves between two of its states."""

import json
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache

from x402mw.core.amounts import Atomic, atomic
from x402mw.escrow.modes import house
from x402mw.escrow.rules import table
from x402mw.escrow.rules.table import Event, NotCovered
from x402mw.escrow.rules.values import Escrow, Transfer, agent_account

BPS = 10_000
Payees = tuple[tuple[str, Fraction], ...]
"""Agents and the fraction each gets of what the provider earns; the fractions sum to 1."""


def split_fee(released: Atomic, fee_bps: int, referral_bps: int = 0) -> tuple[Atomic, Atomic]:
    """The fee and the referral within it, on everything ever released from one escrow.

    Rounding the running total, never one release, makes the fee the same for any splitting of the
    same amount (`docs/money.md` 3).
    """
    fee = released * fee_bps // BPS
    return atomic(fee), atomic(fee * referral_bps // BPS)


def split_largest(amount: int, fractions: Sequence[Fraction]) -> list[int]:
    """Splits whole units exactly by fractions that sum to 1, the last ones by largest rest.

    Of equal rests the earlier one has it (requirement E23).
    """
    exact = [amount * fraction for fraction in fractions]
    shares = [value.numerator // value.denominator for value in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_rest[: amount - sum(shares)]:
        shares[i] += 1
    return shares


def write_payees(payees: Iterable[tuple[str, str]]) -> str:
    """A revenue split as it is kept in an escrow: (agent, fraction as decimal text) in order."""
    return json.dumps([list(pair) for pair in payees], separators=(",", ":"))


@lru_cache(1000)
def read_payees(text: str) -> Payees:
    """The split that `write_payees` wrote; empty if there is none."""
    return tuple((agent, Fraction(share)) for agent, share in json.loads(text or "[]"))


def raised(escrow: Escrow, released: int) -> dict[str, Atomic]:
    """R at this total, and the fee and referral that belong to it."""
    total = atomic(released)
    fee, referral = split_fee(total, escrow.fee_bps, escrow.referral_bps)
    return {"released": total, "fee": fee, "referral": referral}


def give_money_back(escrow: Escrow, amount: Atomic) -> Escrow:
    """The provider returns what it was paid, from its own account; the fee stays."""
    table.check(escrow, Event.RETURN)
    left = escrow.released - escrow.returned
    if amount > left:
        raise NotCovered("released and not yet returned", left)
    return escrow._replace(returned=atomic(escrow.returned + amount))


def transfers(before: Escrow, after: Escrow) -> list[Transfer]:
    """Which money one operation moves: the difference of two states of one escrow."""
    fee, referral = after.fee - before.fee, after.referral - before.referral
    buyer, provider = agent_account(after.buyer), agent_account(after.provider)
    earned = after.released - before.released - fee
    moves = (
        (buyer, after.account, after.amount - before.amount),
        *((after.account, payee, share) for payee, share in _shares(after, provider, earned)),
        (after.account, house(after.asset), fee - referral),
        (after.account, agent_account(after.referrer), referral),
        (after.account, buyer, after.refunded - before.refunded),
        (provider, buyer, after.returned - before.returned),
    )
    return [Transfer(source, target, atomic(moved)) for source, target, moved in moves if moved]


def _shares(escrow: Escrow, provider: str, earned: int) -> Iterable[tuple[str, int]]:
    if not escrow.payees:
        return ((provider, earned),)
    payees = read_payees(escrow.payees)
    shares = split_largest(earned, [fraction for _, fraction in payees])
    return [(agent_account(agent), share) for (agent, _), share in zip(payees, shares, strict=True)]


def balance_changes(moves: Iterable[Transfer]) -> dict[str, int]:
    """Adds transfers up to one signed change per account."""
    changes: dict[str, int] = {}
    for move in moves:
        changes[move.source] = changes.get(move.source, 0) - move.amount
        changes[move.target] = changes.get(move.target, 0) + move.amount
    return changes

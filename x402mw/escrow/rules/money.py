"""Money in an escrow: fee, referral, revenue split, and what moves between two of its states."""

import json
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache

from x402mw.core.amounts import Atomic, atomic
from x402mw.escrow.modes import house
from x402mw.escrow.rules import table
from x402mw.escrow.rules.table import Event, NotCovered
from x402mw.escrow.rules.values import Escrow, Transfer, agent_account

BPS = 10_000
_HALF = Fraction(1, 2)
Payees = tuple[tuple[str, Fraction], ...]
"""Agents and the fraction each gets of what the provider earns; the fractions sum to 1."""


def split_fee(released: Atomic, fee_bps: int, referral_bps: int = 0) -> tuple[Atomic, Atomic]:
    """The fee and the referral within it, on everything ever released from one escrow.

    Rounding the running total, never one release, makes the fee the same for any splitting of the
    same amount (`docs/money.md` 3).
    """
    fee = released * fee_bps // BPS
    return atomic(fee), atomic(fee * referral_bps // BPS)


def share_out(total: int, fractions: Sequence[Fraction]) -> list[int]:
    """Splits a running total of whole units by fractions that sum to 1 (requirement E23).

    As if each unit in turn went to whoever has the largest fraction / (2 x units so far + 1), of
    equals the first (Sainte-Laguë). So shares only grow with the total, and do not depend on the
    steps by which it grew; to round each release by itself could give one payee every odd unit.
    """
    indices = range(len(fractions))
    shares = [math.floor(total * fraction + _HALF) for fraction in fractions]
    for _ in range(total - sum(shares)):
        shares[max(indices, key=lambda i: (fractions[i] / (2 * shares[i] + 1), -i))] += 1
    for _ in range(sum(shares) - total):
        holders = [i for i in indices if shares[i]]
        shares[min(holders, key=lambda i: (fractions[i] / (2 * shares[i] - 1), -i))] -= 1
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
    moves = (
        (buyer, after.account, after.amount - before.amount),
        *((after.account, payee, share) for payee, share in _earnings(before, after)),
        (after.account, house(after.asset), fee - referral),
        (after.account, agent_account(after.referrer), referral),
        (after.account, buyer, after.refunded - before.refunded),
        (provider, buyer, after.returned - before.returned),
    )
    return [Transfer(source, target, atomic(moved)) for source, target, moved in moves if moved]


def _earnings(before: Escrow, after: Escrow) -> list[tuple[str, int]]:
    """Who earns how much of what was released between two states."""
    totals = [escrow.released - escrow.fee for escrow in (before, after)]
    if not after.payees:
        return [(agent_account(after.provider), totals[1] - totals[0])]
    payees = read_payees(after.payees)
    had, has = (share_out(total, [fraction for _, fraction in payees]) for total in totals)
    return [
        (agent_account(agent), new - old)
        for (agent, _), old, new in zip(payees, had, has, strict=True)
    ]


def balance_changes(moves: Iterable[Transfer]) -> dict[str, int]:
    """Adds transfers up to one signed change per account."""
    changes: dict[str, int] = {}
    for move in moves:
        changes[move.source] = changes.get(move.source, 0) - move.amount
        changes[move.target] = changes.get(move.target, 0) + move.amount
    return changes

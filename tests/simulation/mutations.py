"""Bugs put in on purpose: the simulation must find each within a bounded number of seeds.

Each one is a mistake that somebody could make: a check left out, a total counted twice, a row not
written. What finds none of them proves nothing.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock

from x402mw.core import gate, sessions
from x402mw.core.amounts import Atomic, atomic
from x402mw.core.sessions import Account
from x402mw.escrow import idempotency, redemption
from x402mw.escrow.redemption import BadItem
from x402mw.escrow.rules import money, session
from x402mw.escrow.transactions import Transaction
from x402mw.provider.journal import calls
from x402mw.provider.journal.sqlite import SqliteStore
from x402mw.provider.prices import PricedRoute
from x402mw_client.books import Books
from x402mw_client.flow import Payment

Patch = AbstractContextManager[Any]


def _admit_without_cover() -> Patch:
    """The provider reserves without looking whether vouchers cover it."""

    def admit(account: Account, *, cumulative: int, amount: int, deposit: int) -> Account:
        reserved = Atomic(account.reserved + amount)
        best = Atomic(max(account.best, cumulative, account.charged + reserved))
        most = Atomic(max(account.deposit, deposit, best))
        return replace(account, reserved=reserved, best=best, deposit=most)

    return mock.patch.object(sessions, "admit", admit)


def _run_a_seq_twice() -> Patch:
    """The row of (session, seq) is not looked for."""
    decide = gate.decide

    def forgetful(claim: Any, **named: Any) -> Any:
        return decide(claim, **{**named, "call": None})

    return mock.patch.object(gate, "decide", forgetful)


def _forget_calls_too_early() -> Patch:
    """Rows are pruned while their vouchers can still be admitted."""
    return mock.patch.multiple(calls, KEEP_SECONDS=-410, _check_forgotten=lambda *_: None)


def _charge_failures() -> Patch:
    """Failed calls are charged like others."""
    return mock.patch.object(PricedRoute, "charges", return_value=True)


def _serve_before_commit() -> Patch:
    """The journal says that a batch is durable, and does not write it."""
    commit, counted = SqliteStore.commit, [0]

    def sometimes(store: Any) -> None:
        counted[0] += 1
        if counted[0] % 40:
            commit(store)

    return mock.patch.object(SqliteStore, "commit", sometimes)


def _leave_calls_of_the_dead() -> Patch:
    """Nobody settles what a dead worker left open."""
    return mock.patch.multiple(
        "x402mw.provider.journal.opening", resolve=lambda *_: 0, recover=lambda *_: 0
    )


def _redeem_beyond_the_voucher() -> Patch:
    """The escrow pays the amount that the provider names."""
    verify = redemption._verify

    def trusting(item: Any, keys: Any) -> Any:
        claim = verify(item, keys)
        if isinstance(claim, BadItem):
            return claim
        return redemption.Claim(claim.escrow_id, item.amount, claim.final)

    return mock.patch.object(redemption, "_verify", trusting)


def _redeem_by_difference() -> Patch:
    """A redemption adds to what was paid, instead of raising it to a total."""

    def redeem(escrow: Any, proven: Atomic) -> Any:
        more = Atomic(min(escrow.amount, escrow.redeemed + proven))
        return _real_redeem(escrow, more)

    return mock.patch.object(session, "redeem", redeem)


_real_redeem = session.redeem


def _fee_per_release() -> Patch:
    """The fee is rounded for each release by itself."""
    raise_released = session._raise_released

    def rounded(escrow: Any, cumulative: Atomic) -> Any:
        raised = raise_released(escrow, cumulative)
        moved = raised["released"] - escrow.released
        return {**raised, "fee": atomic(escrow.fee + moved * escrow.fee_bps // money.BPS)}

    return mock.patch.object(session, "_raise_released", rounded)


def _post_twice() -> Patch:
    """A deadline is entered two times."""
    enter = Transaction._enter

    def twice(tx: Any, kind: str, *given: Any, **named: Any) -> None:
        enter(tx, kind, *given, **named)
        if kind == "deadline":
            enter(tx, kind, *given, **named)

    return mock.patch.object(Transaction, "_enter", twice)


_close_by_buyer = session.close_by_buyer


def _refund_at_once() -> Patch:
    """A buyer that closes has its rest back before the vouchers were redeemed."""

    def close(escrow: Any, now: int) -> Any:
        return _close_by_buyer(escrow._replace(claim_until=None), now)

    return mock.patch.object(session, "close_by_buyer", close)


def _forget_idempotency_keys() -> Patch:
    """The escrow does an operation again when its answer was lost."""

    async def nothing(*_: Any) -> None:
        return None

    return mock.patch.multiple(idempotency, find=nothing, store=nothing)


def _sign_anew_when_an_answer_is_lost() -> Patch:
    """The buyer makes a new payment of a retry."""
    send_again = Payment._send_again

    def anew(payment: Any, answer: Any) -> Any:
        payment.call = payment.form = None
        return (yield from send_again(payment, answer))

    return mock.patch.object(Payment, "_send_again", anew)


def _drop_the_hold_of_a_lost_call() -> Patch:
    """The buyer believes that what was not answered cost nothing."""
    leave = Books.leave

    def forget(books: Any, call: Any) -> None:
        if call.charge is None:
            books.free(call)
        leave(books, call)

    return mock.patch.object(Books, "leave", forget)


MUTATIONS: dict[str, Callable[[], Patch]] = {
    "admit-without-cover": _admit_without_cover,
    "run-a-seq-twice": _run_a_seq_twice,
    "forget-calls-too-early": _forget_calls_too_early,
    "charge-failures": _charge_failures,
    "serve-before-commit": _serve_before_commit,
    "leave-calls-of-the-dead": _leave_calls_of_the_dead,
    "redeem-beyond-the-voucher": _redeem_beyond_the_voucher,
    "redeem-by-difference": _redeem_by_difference,
    "fee-per-release": _fee_per_release,
    "post-twice": _post_twice,
    "refund-at-once": _refund_at_once,
    "forget-idempotency-keys": _forget_idempotency_keys,
    "sign-anew-when-an-answer-is-lost": _sign_anew_when_an_answer_is_lost,
    "drop-the-hold-of-a-lost-call": _drop_the_hold_of_a_lost_call,
}
"""Each mutation by its name, as a patch of the production code."""

"""Deliberate bugs, each of which the oracle must catch: the proof that the harness can fail.

A mutant is patched into every process of a schedule when it begins. Each stands for a mistake that
is easily made: a write that comes too late, an identity that is not kept, a sum for a maximum.
"""

import os
from collections.abc import Callable
from typing import Any

from tests.faults.points import patch
from x402mw.core.gate import Outcome
from x402mw.escrow.rules import session
from x402mw.provider.journal import calls, redemption
from x402mw.provider.journal.sqlite import SqliteStore
from x402mw_client.flow import Payment
from x402mw_client.walletfile import WalletFile


def _answer_before_commit() -> None:
    """The journal tells its callers before it has committed, and forgets every few batches."""
    commit, batches = SqliteStore.commit, [0]

    def careless(store: SqliteStore) -> None:
        batches[0] += 1
        if batches[0] % 20:
            commit(store)
        else:
            store.connection.execute("ROLLBACK")

    patch("x402mw.provider.journal.sqlite:SqliteStore.commit", careless)


def _forget_seq() -> None:
    """A call whose seq was seen before runs once more, instead of being answered again."""
    admit = calls.admit

    def forgetful(transaction: Any, claim: Any, **named: Any) -> Any:
        found = admit(transaction, claim, **named)
        if not isinstance(found, Outcome):
            return found
        terms = claim.terms
        return calls.Admitted(claim.session, claim.seq, claim.commitment, terms, terms.amount)

    patch("x402mw.provider.journal.calls:admit", forgetful)


def _leave_open() -> None:
    """What a dead worker left open is left open."""
    for module in ("opening", "writer"):
        patch(f"x402mw.provider.journal.{module}:recover", lambda *_: 0)


def _sign_anew() -> None:
    """After a lost answer the buyer signs a new call instead of sending the same bytes."""
    send_again = Payment._send_again

    def careless(payment: Payment, answer: Any) -> Any:
        yield from send_again(payment, answer)
        payment.call = payment.form = None

    patch("x402mw_client.flow:Payment._send_again", careless)


def _open_unnoted() -> None:
    """The wallet asks for a session before it has remembered that it does."""
    patch("x402mw_client.walletfile:WalletFile.begin", lambda *_: None)


def _ask_twice() -> None:
    """The escrow does not remember what it did under an idempotency key."""

    async def nothing(*_: Any) -> None:
        return

    patch("x402mw.escrow.idempotency:store", nothing)


def _pay_sums() -> None:
    """A redemption adds to what was paid, instead of raising it to the total."""
    redeem = session.redeem

    def adding(escrow: Any, proven: Any) -> Any:
        return redeem(escrow, min(escrow.amount, escrow.released + proven))

    patch("x402mw.escrow.rules.session:redeem", adding)


def _charge_undelivered() -> None:
    """A call that was never answered is charged in full when its worker is dead."""
    patch("x402mw.provider.journal.calls:_marked", lambda transaction, row: (row.amount, 0))


def _send_unnoted() -> None:
    """The redeemer sends what it has not written down as sent."""

    def careless(transaction: Any, row: Any) -> redemption.Item:
        final = redemption._may_close(row)
        return redemption.Item(row.id, row.journal, row.voucher, row.account.charged, final=final)

    patch("x402mw.provider.journal.redemption:_send", careless)


def _forget_holds() -> None:
    """The wallet does not remember a call before its voucher leaves."""
    hold = WalletFile.hold

    def careless(file: WalletFile, *given: Any, **named: Any) -> bool:
        return hold(file, *given, **named) if os.getpid() % 2 else True

    patch("x402mw_client.walletfile:WalletFile.hold", careless)


_BUGS: dict[str, tuple[Callable[[], None], str]] = {
    "answer-before-commit": (_answer_before_commit, ""),
    "forget-seq": (_forget_seq, "provider.pay.replay"),
    "leave-open": (_leave_open, "provider.pay.work"),
    "sign-anew": (_sign_anew, "buyer-provider drop_answer"),
    "open-unnoted": (_open_unnoted, "buyer.open.add before"),
    "ask-twice": (_ask_twice, "buyer-escrow drop_answer"),
    "pay-sums": (_pay_sums, ""),
    "charge-undelivered": (_charge_undelivered, "provider.pay.work"),
    "send-unnoted": (_send_unnoted, ""),
    "forget-holds": (_forget_holds, ""),
}
"""Each bug, and the faults that bring it to light soonest."""

MUTANTS = {name: focus for name, (_, focus) in _BUGS.items()}


def apply(name: str) -> None:
    """Patches a bug into this process, if one is named."""
    if name:
        _BUGS[name][0]()

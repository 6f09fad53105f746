"""The named failpoints: where in our code a process may die, stop or meet a full disk.

Production code knows nothing of them. A process of the harness wraps the functions named here when
it starts; each counts its passes on the board and may act before or after the function runs.
"""

import functools
import importlib
import inspect
import os
import signal
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy.exc import OperationalError

from tests.faults.board import Action, Board

FULL = "database or disk is full"


@dataclass(frozen=True, slots=True)
class Point:
    """One failpoint: `role.step.name`, and the function `module:attribute` that it stands at.

    `needs` says what a schedule must contain for it to be passed at all; `error` names what may be
    raised there.
    """

    name: str
    target: str
    needs: str = ""
    error: str = ""

    @property
    def role(self) -> str:
        """The process it is in."""
        return self.name.partition(".")[0]


_PAY, _JOURNAL, _REDEEMER = "x402mw.provider", "x402mw.provider.journal", "x402mw.provider.redeemer"
_ESCROW, _BUYER = "x402mw.escrow", "x402mw_client"

POINTS = (
    # The provider is paid.
    Point("provider.pay.inspect", "x402mw.core.gate:inspect"),
    Point("provider.pay.bind", f"{_PAY}.visit:PaidVisit._bind"),
    Point("provider.pay.admit", f"{_JOURNAL}.journal:Journal.admit"),
    Point("provider.pay.reserve", f"{_JOURNAL}.calls:admit"),
    Point("provider.pay.turn", f"{_JOURNAL}.turn:Turn.take"),
    Point("provider.pay.commit", f"{_JOURNAL}.writer:Writer._commit", error="sqlite"),
    Point("provider.pay.run", f"{_PAY}.responder:PaidCall.run"),
    Point("provider.pay.work", "tests.faults.shop:work"),
    Point("provider.pay.settle", f"{_PAY}.service:Service.settle"),
    Point("provider.pay.charge", f"{_JOURNAL}.calls:settle"),
    Point("provider.pay.head", f"{_PAY}.responder:PaidCall._send_start"),
    Point("provider.pay.body", f"{_PAY}.responder:PaidCall._send_body"),
    Point("provider.pay.replay", f"{_PAY}.visit:PaidVisit._replay", needs="replay"),
    Point("provider.stream.start", f"{_JOURNAL}.journal:Journal.start", needs="stream"),
    Point("provider.stream.mark", f"{_JOURNAL}.journal:Journal.mark", needs="stream"),
    # It starts, and settles what a dead process left.
    Point("provider.start.recover", f"{_JOURNAL}.opening:recover", needs="restart"),
    Point("provider.others.resolve", f"{_JOURNAL}.writer:resolve", needs="others"),
    Point("provider.start.meet", f"{_PAY}.link:EscrowLink._meet", needs="start"),
    Point("provider.start.register", f"{_PAY}.link:EscrowLink.ensure_registered", needs="start"),
    Point("provider.start.terms", f"{_JOURNAL}.journal:Journal.keep_terms", needs="start"),
    # It redeems.
    Point("provider.redeem.contact", f"{_REDEEMER}:Redeemer._take_changes"),
    Point("provider.redeem.changes", f"{_JOURNAL}.journal:Journal.apply_changes"),
    Point("provider.redeem.due", f"{_JOURNAL}.journal:Journal.due"),
    Point("provider.redeem.send", f"{_REDEEMER}:Redeemer._send_batch"),
    Point("provider.redeem.apply", f"{_JOURNAL}.journal:Journal.apply_verdicts"),
    # It closes a session, and stops.
    Point("provider.close.begin", f"{_JOURNAL}.journal:Journal.begin_close"),
    Point("provider.close.item", f"{_JOURNAL}.journal:Journal.due_session"),
    Point("provider.close.redeem", f"{_REDEEMER}:Redeemer.redeem_session"),
    Point("provider.close.answer", f"{_PAY}.control:_content"),
    Point("provider.stop.redeem", f"{_REDEEMER}:Redeemer.redeem_all", needs="stop"),
    # The escrow moves money.
    Point("escrow.any.begin", f"{_ESCROW}.transactions:Transaction.begin"),
    Point("escrow.any.flush", f"{_ESCROW}.transactions:Transaction.flush", error="sqlalchemy"),
    Point("escrow.any.entries", f"{_ESCROW}.transactions:Transaction._write_entries"),
    Point("escrow.any.escrows", f"{_ESCROW}.transactions:Transaction._write_new_escrows"),
    Point("escrow.any.remember", f"{_ESCROW}.idempotency:store", error="sqlalchemy"),
    Point("escrow.any.answer", f"{_ESCROW}.web:respond"),
    Point("escrow.register.journal", f"{_ESCROW}.agents:register_journal", needs="start"),
    Point("escrow.open.create", f"{_ESCROW}.sessions:create"),
    Point("escrow.topup.grow", f"{_ESCROW}.sessions:top_up", needs="topup"),
    Point("escrow.token.renew", f"{_ESCROW}.sessions:renew_token", needs="time"),
    Point("escrow.release.pay", f"{_ESCROW}.sessions:release", needs="release"),
    Point("escrow.redeem.judge", f"{_ESCROW}.redemption:judge"),
    Point("escrow.redeem.move", f"{_ESCROW}.redemption:redeem"),
    Point("escrow.redeem.settle", f"{_ESCROW}.redemption:_settle"),
    Point("escrow.close.buyer", f"{_ESCROW}.sessions:close_as_buyer", needs="gone"),
    Point("escrow.refund.deadline", f"{_ESCROW}.deadlines:reach_deadline", needs="gone"),
    # The buyer opens sessions, signs, and learns what became of it.
    Point("buyer.any.ask", f"{_BUYER}.escrow:AsyncEscrowClient.run"),
    Point("buyer.any.write", f"{_BUYER}.walletfile:WalletFile._begin", error="sqlite"),
    Point("buyer.open.trust", f"{_BUYER}.state:WalletState.pin"),
    Point("buyer.open.begin", f"{_BUYER}.purse:Purse.begin"),
    Point("buyer.open.add", f"{_BUYER}.purse:Purse.add"),
    Point("buyer.topup.renew", f"{_BUYER}.purse:Purse.renew", needs="topup"),
    Point("buyer.pay.sign", f"{_BUYER}.purse:Purse.sign"),
    Point("buyer.pay.hold", f"{_BUYER}.walletfile:WalletFile.hold", error="sqlite"),
    Point("buyer.pay.header", f"{_BUYER}.purse:Purse.header"),
    Point("buyer.pay.answer", f"{_BUYER}.flow:read_word"),
    Point("buyer.pay.settle", f"{_BUYER}.purse:Purse.settle"),
    Point("buyer.release.ask", "tests.faults.shopper:release", needs="release"),
    Point("buyer.close.end", f"{_BUYER}.purse:Purse.end"),
    Point("buyer.close.ask", f"{_BUYER}.drive:AsyncDriver._control"),
    Point("buyer.close.close", f"{_BUYER}.purse:Purse.close"),
)

ERRORS: dict[str, Callable[[], Exception]] = {
    "sqlite": lambda: sqlite3.OperationalError(FULL),
    "sqlalchemy": lambda: OperationalError("", None, sqlite3.OperationalError(FULL)),
}


def patch(target: str, value: Any) -> None:
    """Puts something else in the place `module:attribute`, for the rest of this process."""
    holder, name, _ = find(target)
    setattr(holder, name, value)


def find(target: str) -> tuple[Any, str, Any]:
    """The object that holds what `module:attribute` names, its name there, and what it is."""
    module, _, path = target.partition(":")
    holder: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        holder = getattr(holder, parent)
    return holder, name, inspect.getattr_static(holder, name)


def install(board: Board, role: str) -> None:
    """Wraps the functions of every failpoint of a role; once, in a process that just began."""
    for number, point in enumerate(POINTS):
        if point.role == role:
            _, _, found = find(point.target)
            patch(point.target, _wrap(board, number, point, found))


def _wrap(board: Board, number: int, point: Point, found: Any) -> Any:
    if isinstance(found, classmethod):
        return classmethod(_wrap(board, number, point, found.__func__))

    def act(side: int) -> None:
        action = board.passed(number, side)
        if action is not None:
            _carry_out(action, point)

    if inspect.iscoroutinefunction(found):

        @functools.wraps(found)
        async def passing(*given: Any, **named: Any) -> Any:
            act(0)
            result = await found(*given, **named)
            act(1)
            return result

        return passing

    @functools.wraps(found)
    def passing_by(*given: Any, **named: Any) -> Any:
        act(0)
        result = found(*given, **named)
        act(1)
        return result

    return passing_by


def _carry_out(action: Action, point: Point) -> None:
    if action is Action.KILL:
        os.kill(os.getpid(), signal.SIGKILL)
    elif action is Action.STALL:
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        raise ERRORS[point.error]()

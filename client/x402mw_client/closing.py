"""Closing sessions, so that their rest returns: by the provider at once, else by the escrow."""

import logging

import httpx

from x402mw.core.amounts import USDC, display
from x402mw.core.errors import EscrowRefused, EscrowUnavailable, Malformed
from x402mw.core.keys import public_key
from x402mw.core.strict import loads_object
from x402mw_client import operations
from x402mw_client.answers import retry_after
from x402mw_client.control import control
from x402mw_client.events import tell
from x402mw_client.receipts import ReceiptRefused, read_receipt
from x402mw_client.records import EscrowRecord
from x402mw_client.sessions import Session, State
from x402mw_client.state import WalletState
from x402mw_client.steps import Ask, Sleep, Story, Together, patiently
from x402mw_client.upkeep import finish_openings

CLOSE_SECONDS = 5.0
LIVE = ("locked", "partially_released")
OVER = ("released", "refunded", "settled")


def close_all(wallet: WalletState) -> Story[None]:
    """Closes every session of the wallet: at its provider, else at the escrow.

    As long as other processes use the wallet they keep the sessions; the last one closes them.
    """
    if wallet.purse.forked:
        # Its parent goes on with them.
        return
    if (yield from patiently(wallet.purse.leave_to_others)):
        text = "the sessions stay open for the other processes of this wallet"
        tell(logging.INFO, "sessions_left_open", text)
        return
    yield from finish_openings(wallet)
    sessions = [s for s in wallet.purse.sessions.values() if s.state is not State.CLOSED]
    yield Together([close_session(wallet, session) for session in sessions])


def close_session(wallet: WalletState, session: Session) -> Story[None]:
    """Closes a session so that its rest returns: by the provider at once, else by the escrow."""
    wallet.purse.end(session)
    charged = yield from _close_at_provider(wallet, session)
    if charged is not None:
        charged = yield from _confirm(session, charged)
    if charged is not None:
        wallet.purse.close(session, charged)
        text = f"closed session {session.name}: paid {display(charged)} in all"
        fields = {"session": session.name, "amount": charged, "asset": USDC.code}
        tell(logging.INFO, "session_closed", text, **fields)
        return
    try:
        yield Ask(operations.close(session.id))
    except EscrowRefused as error:
        _tell_open(logging.INFO, session, error.reason)
    except EscrowUnavailable:
        _tell_open(logging.WARNING, session, "neither side could be reached")
        return
    # Its holds stay counted: the provider may still redeem what we signed.
    wallet.purse.close(session, None)


def _tell_open(level: int, session: Session, reason: str) -> None:
    text = f"session {session.name} was not closed: {reason}"
    tell(level, "session_not_closed", text, session=session.name, reason=reason)


def _tell_receipt(level: int, session: Session, what: str) -> None:
    text = f"session {session.name}: the final receipt {what}"
    tell(level, "receipt_wrong", text, session=session.name)


def _confirm(session: Session, charged: int) -> Story[int | None]:
    """Asks the escrow what a session came to, for a receipt may lie; None if it is not over."""
    try:
        record: EscrowRecord = yield Ask(operations.status(session.id))
    except (EscrowRefused, EscrowUnavailable):
        return charged
    if record.status not in OVER:
        _tell_receipt(logging.ERROR, session, "came before the end")
        return None
    if record.released > charged:
        _tell_receipt(logging.ERROR, session, "says less than was taken")
    return max(charged, record.released)


def _close_at_provider(wallet: WalletState, session: Session) -> Story[int | None]:
    """Asks the provider to close, for a few seconds; returns the signed final charge."""
    deadline = wallet.clock() + CLOSE_SECONDS
    while True:
        try:
            answer = yield from control(wallet, session, {"op": "close"})
        except httpx.TransportError:
            return None
        if answer.status_code == httpx.codes.OK:
            return _final_charge(wallet, session, answer)
        left = deadline - wallet.clock()
        if answer.status_code != httpx.codes.ACCEPTED or left <= 0:
            return None
        # Whatever it asks for, it gets its last chance at the deadline.
        yield Sleep(min(retry_after(answer, 1.0), left))


def _final_charge(wallet: WalletState, session: Session, answer: httpx.Response) -> int | None:
    """Checks the provider's final receipt: signed by its receipt key, and within what we signed."""
    try:
        text = loads_object(answer.content).get("receipt")
        receipt = read_receipt(session, text)
    except (Malformed, ReceiptRefused) as error:
        _tell_receipt(logging.WARNING, session, str(error))
        return None
    if not receipt.final:
        _tell_receipt(logging.ERROR, session, "is not the final one")
        return None
    wallet.purse.look()
    if not session.charged <= receipt.charged <= session.spent:
        _tell_receipt(logging.ERROR, session, "does not fit our account")
        wallet.purse.differ(session)
        return None
    session.receipt = str(text)
    return receipt.charged


def close_lost(wallet: WalletState) -> Story[int]:
    """Closes open sessions whose keys this wallet does not have; returns how many."""
    # What is being opened has its key on file already, and its session soon.
    begun = {public_key(opening.seed) for opening in wallet.purse.openings.values()}
    after, closed = None, 0
    while True:
        page = yield Ask(operations.list_escrows(role="buyer", after=after))
        for record in page.items:
            ours = record.session_key is None or record.session_key in begun
            if not ours and record.status in LIVE:
                closed += yield from _close_lost(wallet, record)
        after = page.next
        if after is None:
            return closed


def _close_lost(wallet: WalletState, record: EscrowRecord) -> Story[bool]:
    if record.session in wallet.purse.sessions:
        return False
    try:
        yield Ask(operations.close(record.session))
    except EscrowRefused:
        return False
    text = f"closed a lost session of {display(record.deposit)}"
    tell(logging.INFO, "lost_session_closed", text, amount=record.deposit, asset=USDC.code)
    return True

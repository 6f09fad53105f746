"""Receipts on the way: every so many charged calls the provider is asked to sign for its account.

A receipt is evidence for the buyer and moves no money. It is asked for beside the calls, never
instead of one, and what is wrong with it is told once: the next is asked for as many calls later.
"""

import logging
from dataclasses import dataclass, field
from typing import ClassVar

import httpx

from x402mw.core.errors import Malformed, RemoteError, TokenRefused, X402mwError
from x402mw.core.strict import loads_object
from x402mw.core.tokens import Receipt, open_receipt
from x402mw_client.answers import retry_after
from x402mw_client.control import QUIET_SECONDS, control
from x402mw_client.events import tell
from x402mw_client.purse import Purse
from x402mw_client.sessions import Session
from x402mw_client.state import WalletState
from x402mw_client.steps import Story, patiently


class ReceiptRefused(RemoteError):
    """A provider gave no receipt, or one that is not true; `session` is its session's id."""

    code: ClassVar[str] = "receipt_refused"

    def __init__(self, message: str, *, session: str) -> None:
        """`session` is written as `esc_...`."""
        super().__init__(message)
        self.session = session


@dataclass(frozen=True, slots=True)
class SignedReceipt:
    """The provider's signed account of one session; amounts in atomic units, time in seconds.

    `text` is the evidence itself: a JWS by the receipt key that the session's token names.
    """

    session: str
    charged: int
    open: int
    issued_at: int
    final: bool
    text: str = field(repr=False)


def newest_receipt(session: Session) -> SignedReceipt | None:
    """The newest receipt that is kept for a session."""
    if not session.receipt:
        return None
    found = read_receipt(session, session.receipt)
    return SignedReceipt(
        session.name, found.charged, found.open, found.issued_at, found.final, session.receipt
    )


def read_receipt(session: Session, text: object) -> Receipt:
    """Checks who signed a receipt, and for what; raises `ReceiptRefused`."""
    token = session.opened_token()
    try:
        receipt = open_receipt(text if isinstance(text, str) else "", token.receipt_key)
    except (Malformed, TokenRefused) as error:
        raise ReceiptRefused(f"the receipt is not valid: {error}", session=session.name) from None
    found = (receipt.network, receipt.session, receipt.pay_to, receipt.journal)
    if found != (session.offer.accepts["network"], session.id, token.pay_to, token.journal):
        raise ReceiptRefused("the receipt is about something else", session=session.name)
    return receipt


def fetch_receipt(wallet: WalletState, session: Session) -> Story[None]:
    """Asks for a receipt, checks it against our own account, and keeps it."""
    try:
        yield from _fetch(wallet, session)
    except (X402mwError, httpx.TransportError) as error:
        text = f"session {session.name}: no receipt: {type(error).__name__} {error}"
        tell(logging.WARNING, "receipt_wrong", text, session=session.name)
        if not isinstance(error, ReceiptRefused):
            error = ReceiptRefused(text, session=session.name)
        wallet.on_receipt(error)


def _fetch(wallet: WalletState, session: Session) -> Story[None]:
    if wallet.clock() < session.ask_after:
        raise ReceiptRefused("the provider wants to be asked later", session=session.name)
    known = max(session.charged, _charged(session))
    answer = yield from control(wallet, session, {"op": "receipt"})
    if answer.status_code == httpx.codes.TOO_MANY_REQUESTS:
        session.ask_after = wallet.clock() + retry_after(answer, QUIET_SECONDS)
    if answer.status_code != httpx.codes.OK:
        raise ReceiptRefused(f"it answered {answer.status_code}", session=session.name)
    text = loads_object(answer.content).get("receipt")
    receipt = read_receipt(session, text)
    purse = wallet.purse
    yield from patiently(
        lambda: purse.change(lambda: _keep(purse, session, str(text), receipt, known))
    )
    found = newest_receipt(session)
    if found is not None:
        wallet.on_receipt(found)


def _keep(purse: Purse, session: Session, text: str, receipt: Receipt, known: int) -> None:
    """Keeps a receipt if it fits: at least `known` is charged, at most what we believe to owe."""
    if not known <= receipt.charged <= session.spent:
        raise ReceiptRefused("the receipt does not fit our account", session=session.name)
    # One that was asked for later may have overtaken it.
    if receipt.charged >= _charged(session):
        session.receipt = text
        purse.save(session)


def _charged(session: Session) -> int:
    kept = newest_receipt(session)
    return 0 if kept is None else kept.charged

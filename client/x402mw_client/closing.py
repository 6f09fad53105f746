"""What became of a call, and of a session: asking the provider's control path, and closing.

A control request is an ordinary voucher for nothing, bound to its body (`docs/protocol.md`,
Control); it works with an expired token and on a closed session.
"""

import hashlib
import json
import logging
from typing import Any

import httpx

from x402mw.core.amounts import USDC, ZERO, display, parse_atomic
from x402mw.core.errors import (
    AmountInvalid,
    EscrowRefused,
    EscrowUnavailable,
    Malformed,
    TokenRefused,
    X402mwError,
)
from x402mw.core.keys import public_key
from x402mw.core.strict import loads_object
from x402mw.core.terms import control_terms, write_requirements
from x402mw.core.tokens import open_receipt
from x402mw_client import operations
from x402mw_client.answers import Word, retry_after
from x402mw_client.events import tell
from x402mw_client.operations import EscrowRecord
from x402mw_client.sessions import Call, Offer, Session, State, Subject
from x402mw_client.state import WalletState
from x402mw_client.steps import Ask, Control, Sleep, Story, Together, patiently
from x402mw_client.upkeep import finish_openings

CLOSE_SECONDS = 5.0
DOUBTS_AT_ONCE, DOUBTS_SECONDS = 16, 10.0
QUIET_SECONDS = 60.0
LEARN_PAUSES = (0.0, 0.25)
"""The provider may need a moment to notice that an answer was cut short."""
LIVE = ("locked", "partially_released")
OVER = ("released", "refunded", "settled")


def control(wallet: WalletState, session: Session, body: dict[str, Any]) -> Story[httpx.Response]:
    """Asks the session's provider something on its control path."""
    terms = control_terms(session.offer.terms)
    accepts = write_requirements(terms, escrow=wallet.escrow, suggested_deposit=ZERO)
    raw = json.dumps(body).encode()
    url = session.origin + terms.control
    subject = Subject("POST", session.origin, terms.control, hashlib.sha256(raw).digest(), url)
    signature = wallet.purse.sign_control(session, Offer(terms, accepts), subject)
    answer: httpx.Response = yield Control(url, raw, signature)
    return answer


def resolve_doubts(wallet: WalletState, now: float) -> Story[int]:
    """Asks providers about calls nobody waits for any more; returns how many became certain.

    A caller waits for this, so it takes a bounded time; who was asked last is asked last again.
    """
    known = 0
    wallet.purse.recover()
    doubtful = [session for session in wallet.purse.sessions.values() if session.doubtful]
    for session in sorted(doubtful, key=lambda found: found.asked_at):
        for call in list(session.doubtful.values())[:DOUBTS_AT_ONCE]:
            if wallet.clock() > now + DOUBTS_SECONDS:
                return known
            try:
                known += yield from resolve(wallet, call, now)
            except httpx.TransportError:
                break
    return known


def resolve(wallet: WalletState, call: Call, now: float) -> Story[bool]:
    """Asks what became of one call; tells whether that is certain now.

    A call that is still unknown is freed only when no form of it can be admitted any more *and*
    somebody answered: silence proves nothing.
    """
    session = call.session
    if now < session.ask_after:
        return False
    session.asked_at = now
    answer = yield from control(wallet, session, {"op": "receipt", "seq": str(call.seq)})
    if answer.status_code == httpx.codes.TOO_MANY_REQUESTS:
        # Who asks too often may find its calls refused as well.
        session.ask_after = now + retry_after(answer, QUIET_SECONDS)
    word = _read_receipt_word(answer, call.seq)
    if word is not None and word.final:
        wallet.purse.settle(call, word.charge, word)
        return True
    missing = word.state == "refused" if word else answer.status_code == httpx.codes.NOT_FOUND
    if missing and call.dead(now):
        wallet.purse.free(call)
        return True
    return False


def learn_charge(wallet: WalletState, call: Call) -> Story[None]:
    """Asks for the figure of an answer whose body has just ended.

    What fails here fails silently: the call stays held, and is asked for again when there is need.
    """
    try:
        for pause in LEARN_PAUSES:
            if pause:
                yield Sleep(pause)
            if call.charge is not None or (yield from resolve(wallet, call, wallet.clock())):
                return
    except (httpx.HTTPError, X402mwError) as error:
        text = f"the charge for {call.url} is not known yet: {error}"
        tell(logging.INFO, "charge_unknown", text, session=call.session.name)


def _read_receipt_word(answer: httpx.Response, seq: int) -> Word | None:
    """Reads the answer to control op `receipt` about one call."""
    if answer.status_code != httpx.codes.OK:
        return None
    try:
        content = loads_object(answer.content)
        call = content["seq"]
        return Word(
            state=str(call["state"]),
            reason="",
            final=call["final"] is True,
            charge=parse_atomic(call["charge"]),
            commitment="",
            charged_total=parse_atomic(content["charged"]),
            open_total=parse_atomic(content["open"]),
        )
    except (Malformed, AmountInvalid, KeyError, TypeError):
        return None


def close_all(wallet: WalletState) -> Story[None]:
    """Closes every session of the wallet: at its provider, else at the escrow.

    As long as other processes use the wallet they keep the sessions; the last one closes them.
    """
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
        record: EscrowRecord = yield Ask(operations.get(session.id))
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
    token = session.opened_token()
    try:
        receipt = open_receipt(loads_object(answer.content).get("receipt", ""), token.receipt_key)
    except (Malformed, TokenRefused, AttributeError, TypeError) as error:
        _tell_receipt(logging.WARNING, session, f"is not valid: {error}")
        return None
    found = (receipt.session, receipt.pay_to, receipt.journal, receipt.final)
    if found != (session.id, token.pay_to, token.journal, True):
        _tell_receipt(logging.ERROR, session, "is about something else")
        return None
    wallet.purse.look()
    if not session.charged <= receipt.charged <= session.spent:
        _tell_receipt(logging.ERROR, session, "does not fit our account")
        wallet.purse.differ(session)
        return None
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

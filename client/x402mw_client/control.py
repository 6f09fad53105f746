"""Asking a provider on its control path: what became of a call that nobody knows the end of.

A control request is an ordinary voucher for nothing, bound to its body (`docs/protocol.md`,
Control); it works with an expired token and on a closed session.
"""

import hashlib
import json
import logging
from typing import Any

import httpx

from x402mw.core.amounts import ZERO, parse_atomic
from x402mw.core.errors import AmountInvalid, Malformed, X402mwError
from x402mw.core.strict import loads_object
from x402mw.core.terms import control_terms, write_requirements
from x402mw_client.answers import Word, retry_after
from x402mw_client.events import tell
from x402mw_client.sessions import Call, Offer, Session, Subject
from x402mw_client.state import WalletState
from x402mw_client.steps import Control, Sleep, Story

DOUBTS_AT_ONCE, DOUBTS_SECONDS = 16, 10.0
QUIET_SECONDS = 60.0
LEARN_PAUSES = (0.0, 0.25)
"""The provider may need a moment to notice that an answer was cut short."""


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

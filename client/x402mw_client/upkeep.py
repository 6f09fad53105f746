"""The stories behind a payment: trust the escrow, open a session, keep it funded and fresh.

Each is a generator of steps (`steps`), so that it is told once for async and sync callers. What
many callers need at once is done by one of them, alone in a section; the others wait for it.
"""

import logging
import os
import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from x402mw.core.amounts import Atomic, display, to_atomic
from x402mw.core.errors import (
    AmountInvalid,
    EscrowRefused,
    EscrowUnavailable,
    LimitExceeded,
    LocalError,
    TokenRefused,
)
from x402mw.core.keys import public_key
from x402mw.core.tokens import peek_session_token
from x402mw_client import operations
from x402mw_client.events import tell
from x402mw_client.records import EscrowRecord
from x402mw_client.sessions import (
    RENEW_SECONDS,
    Call,
    Offer,
    Opening,
    Session,
    Stale,
    State,
    deposit_target,
    session_key,
)
from x402mw_client.state import WalletState
from x402mw_client.steps import Ask, Story, Wait, patiently
from x402mw_client.waiting import ENTERED

SECTION_SECONDS = 60.0
ENDED_REASONS = ("session_ending", "invalid_state", "not_found")
UNDECIDED = (401, 403, 429)
"""Refusals that come before the escrow looks at what it did under the same idempotency key."""
LOW_PART = 10
"""A session whose rest is below this part of its target is topped up."""
PAUSE_SECONDS = 30.0
"""What can wait and failed is tried again after this long."""


def alone(wallet: WalletState, name: object, until: Callable[[], Any]) -> Story[Any]:
    """Waits until this caller is inside the section (`ENTERED`), or `until` returns something."""
    ticket = wallet.sections.ticket()
    found = yield Wait(lambda: until() or wallet.sections.enter(name, ticket), SECTION_SECONDS)
    if found is None:
        raise EscrowUnavailable("the escrow did not answer another call of this wallet in time")
    return found


def trust(wallet: WalletState) -> Story[None]:
    """Learns and pins the escrow's network and root key, once."""
    found = yield from alone(wallet, "trust", lambda: wallet.network_id)
    if found is ENTERED:
        with wallet.sections.leaving("trust"):
            wallet.purse.look()
            if not wallet.recall():
                keys = yield Ask(operations.keys())
                yield from patiently(lambda: wallet.pin(keys))


# A session that can take the next call.


def funded_session(
    wallet: WalletState, origin: str, offer: Offer, call: Call | None
) -> Story[Session]:
    """Finds or opens a session for an offer, with a fresh token and cover for one more call.

    `call` may hold some of it already. Policy comes first: what the limits refuse locks nothing.
    """
    key, amount = session_key(origin, offer.terms), offer.terms.amount
    session = wallet.purse.usable(key)
    if session is None:
        wallet.purse.check(amount, amount)
        _target(wallet, offer)
        session = yield from alone(wallet, ("open", key), lambda: wallet.purse.usable(key))
        if session is ENTERED:
            with wallet.sections.leaving(("open", key)):
                # Another process may have opened one just before.
                session = wallet.purse.usable(key) or (yield from _open(wallet, origin, offer))
    now, expires = wallet.clock(), session.opened_token().exp
    if now >= expires - RENEW_SECONDS:
        yield from _fresh_token(wallet, session, now, expires)
        now = wallet.clock()
    if not session.takes_calls(now):
        raise Stale
    more = max(0, amount - session.held_by(call))
    if session.rest < max(more, session.target // LOW_PART):
        yield from _cover(wallet, session, offer, more)
    return session


def _target(wallet: WalletState, offer: Offer) -> Atomic:
    amount = offer.terms.amount
    target = deposit_target(amount, offer.suggested, wallet.min_escrow, wallet.deposit)
    if target < max(amount, wallet.min_escrow):
        raise LimitExceeded(
            "deposit",
            f"the wallet's deposit of {display(wallet.deposit)} does not cover a call of up to"
            f" {display(amount)}",
        )
    return target


def _open(wallet: WalletState, origin: str, offer: Offer) -> Story[Session]:
    begun = wallet.purse.openings.get(session_key(origin, offer.terms))
    found = (yield from _find(wallet, begun)) if begun is not None else None
    if found is not None:
        return found
    target = _target(wallet, offer)
    try:
        opening = _opening(wallet, origin, offer, target, target)
        session = yield from _finish(wallet, opening)
    except EscrowRefused as error:
        # A smaller deposit is better than none, if it covers a call at all.
        balance = _balance(error)
        if not max(offer.terms.amount, wallet.min_escrow) <= balance < target:
            raise
        opening = _opening(wallet, origin, offer, balance, target)
        session = yield from _finish(wallet, opening)
    if not session.takes_calls(wallet.clock()):
        raise LocalError("a new session is over already: is this machine's clock right?")
    return session


def _find(wallet: WalletState, begun: Opening) -> Story[Session | None]:
    """Finishes an opening that was cut off; None if it came to nothing, or is over by now."""
    try:
        session = yield from _finish(wallet, begun)
    except EscrowRefused:
        if begun.pays_for in wallet.purse.openings:
            raise
        return None
    return session if session.takes_calls(wallet.clock()) else None


def _opening(
    wallet: WalletState, origin: str, offer: Offer, amount: Atomic, target: Atomic
) -> Opening:
    key, seed = secrets.token_urlsafe(24), os.urandom(32)
    return Opening(key, origin, offer, seed, amount, target, wallet.session_seconds)


def _finish(wallet: WalletState, opening: Opening) -> Story[Session]:
    """Asks the escrow for a session, or finds the one that an earlier sending of this opened."""
    wallet.purse.check_process()
    yield from patiently(lambda: wallet.purse.begin(opening))
    terms = opening.offer.terms
    operation = operations.open_session(
        terms.pay_to,
        opening.amount,
        session_key=public_key(opening.seed),
        journal=terms.journal,
        expires_in_seconds=opening.seconds,
        key=opening.key,
    )
    try:
        record = yield Ask(operation)
    except EscrowRefused as error:
        if error.status not in UNDECIDED:
            wallet.purse.abandon(opening)
        raise
    opened = _opened(record, opening)
    session = yield from patiently(lambda: wallet.purse.add(opened, opening))
    wallet.events.opened(session)
    return session


def finish_openings(wallet: WalletState) -> Story[None]:
    """Finds the sessions whose openings were cut off, so that they can be closed."""
    for opening in list(wallet.purse.openings.values()):
        try:
            yield from _finish(wallet, opening)
        except (EscrowRefused, EscrowUnavailable, TokenRefused) as error:
            text = f"a session with {opening.origin} may have been opened: {error}"
            tell(logging.WARNING, "session_not_opened", text, origin=opening.origin)


def _balance(refusal: EscrowRefused) -> Atomic:
    try:
        return to_atomic(refusal.problem.get("balance"))
    except AmountInvalid:
        return Atomic(0)


def _opened(record: EscrowRecord, opening: Opening) -> Session:
    terms = opening.offer.terms
    token = peek_session_token(record.token or "")
    found = (token.session, token.pay_to, token.journal, token.session_key)
    if found != (record.session, terms.pay_to, terms.journal, public_key(opening.seed)):
        raise TokenRefused("the escrow's token is not for the session that was asked for")
    return Session(
        id=record.session,
        origin=opening.origin,
        offer=opening.offer,
        seed=opening.seed,
        token=record.token or "",
        target=opening.target,
        deposit=record.deposit,
        expires_at=record.expires_at,
    )


def _enter(
    wallet: WalletState, name: object, done: Callable[[], Any], *, urgent: bool
) -> Story[bool]:
    """Tells whether this caller shall do it: who is not in a hurry never waits for another."""

    def is_done() -> Any:
        wallet.purse.look()
        return done()

    if urgent:
        entered = (yield from alone(wallet, name, is_done)) is ENTERED
    else:
        entered = wallet.sections.enter(name, wallet.sections.ticket()) is ENTERED
    if entered and is_done():
        # Another process did it just before.
        with wallet.sections.leaving(name):
            return False
    return entered


def _fresh_token(wallet: WalletState, session: Session, now: float, expires: int) -> Story[None]:
    """Renews the token near its end; until it has ended nobody waits long for that."""
    if now >= expires or now >= session.renew_after:
        session.renew_after = now + PAUSE_SECONDS
        yield from renew_token(wallet, session, urgent=now >= expires)


def renew_token(wallet: WalletState, session: Session, *, urgent: bool) -> Story[None]:
    """Asks for a new token; unless it is `urgent`, a failure can wait for the next call."""
    name, old = ("token", session.id), session.token

    def done() -> bool:
        return session.token != old or session.state is not State.OPEN

    if not (yield from _enter(wallet, name, done, urgent=urgent)):
        return
    try:
        with wallet.sections.leaving(name):
            renewal = operations.renew_token(session.id)
            record = yield Ask(replace(renewal, repeatable=urgent))
            yield from patiently(lambda: wallet.purse.renew(session, record))
    except (EscrowRefused, EscrowUnavailable) as error:
        if isinstance(error, EscrowRefused) and error.reason in ENDED_REASONS:
            text = f"session {session.name} takes no new calls: {error.reason}"
            tell(logging.INFO, "session_ended", text, session=session.name, reason=error.reason)
            wallet.purse.end(session)
        elif urgent:
            raise


def _cover(wallet: WalletState, session: Session, offer: Offer, more: int) -> Story[None]:
    """Tops the session up to its target when its rest runs low; a call that fits does not wait."""
    low = session.target // LOW_PART if wallet.clock() >= session.topup_after else 0
    urgent = session.rest < more
    if not urgent and session.rest >= low:
        return
    if urgent:
        wallet.purse.check(offer.terms.amount, more, session)

    def done() -> bool:
        return session.rest >= (more if urgent else low)

    if not (yield from _enter(wallet, ("topup", session.id), done, urgent=urgent)):
        return
    session.topup_after = wallet.clock() + PAUSE_SECONDS
    try:
        with wallet.sections.leaving(("topup", session.id)):
            target = _target(wallet, offer)
            yield from patiently(lambda: wallet.purse.aim(session, target))
            yield from _top_up(wallet, session, Atomic(session.target - session.rest), more)
    except (EscrowRefused, EscrowUnavailable) as error:
        text = f"session {session.name} was not topped up: {error}"
        tell(logging.INFO, "session_not_topped_up", text, session=session.name, reason=error.code)
        if urgent:
            raise


def _top_up(wallet: WalletState, session: Session, amount: Atomic, more: int) -> Story[None]:
    try:
        record = yield from _ask_topup(wallet, session, amount)
    except EscrowRefused as error:
        balance = _balance(error)
        if not more - session.rest <= balance < amount or balance == 0:
            raise
        record = yield from _ask_topup(wallet, session, balance)
    before = session.deposit
    yield from patiently(lambda: wallet.purse.renew(session, record))
    session.topup_after = 0.0
    wallet.events.topped_up(session, Atomic(session.deposit - before))


def _ask_topup(wallet: WalletState, session: Session, amount: Atomic) -> Story[EscrowRecord]:
    # One whose answer was lost is sent again under its own key, so that it locks nothing twice.
    operation = wallet.topups.setdefault(session.id, operations.topup(session.id, amount))
    try:
        record: EscrowRecord = yield Ask(operation)
    except EscrowRefused as error:
        if error.status not in UNDECIDED:
            del wallet.topups[session.id]
        raise
    del wallet.topups[session.id]
    return record

"""What a wallet may spend, has spent and holds: every decision about money on the buyer's side.

1. Nothing is signed before its amount is held in every limit; a refused call is held in none.
2. One lock guards all of it, for threads and event loops alike; nothing is awaited inside.
3. The file, if there is one, has the raised total before the voucher exists outside this module.
"""

import logging
import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterable

from x402mw.core import headers
from x402mw.core.amounts import Atomic, display
from x402mw.core.errors import AccountsDiffer, ConfigurationError, LocalError, Malformed
from x402mw.core.keys import public_key
from x402mw.core.messages import EscrowPayload, PaymentPayload
from x402mw.core.vouchers import (
    BIND_BODY,
    BIND_REQUEST,
    NO_BODY_HASH,
    BoundRequest,
    Voucher,
    hash_request,
    parse_voucher,
    sign_voucher,
    verify_voucher,
)
from x402mw_client.answers import Word
from x402mw_client.limits import Bounds, Limits, exceeded
from x402mw_client.memory import Memory
from x402mw_client.operations import EscrowRecord
from x402mw_client.sessions import (
    Call,
    Form,
    Offer,
    Opening,
    Paid,
    Session,
    State,
    Subject,
    differs,
)
from x402mw_client.waiting import Signal

log = logging.getLogger("x402mw.client")

EXPIRES_MS = 300_000


class Stale(Exception):
    """The session cannot take this call as it stands: look for cover, or for another session."""


class Purse:
    """The money side of a wallet."""

    def __init__(
        self,
        limits: Limits,
        memory: Memory,
        clock: Callable[[], float],
        on_payment: Callable[[Paid], None] | None = None,
    ) -> None:
        self.bounds = Bounds.of(limits)
        self.memory = memory
        self.clock = clock
        self.on_payment = on_payment
        self._process = os.getpid()
        self.signal = Signal()
        self.lock = threading.RLock()
        self.sessions: dict[bytes, Session] = {}
        self.openings: dict[tuple[str, str, bytes], Opening] = {}

    # Looking.

    def spent(self) -> int:
        """What all sessions ever may have cost (`Session.at_worst`)."""
        now = self.clock()
        return sum(session.at_worst(now) for session in self.sessions.values())

    def usable(self, key: tuple[str, str, bytes]) -> Session | None:
        """The session that may pay for new calls, if there is one."""
        with self.lock:
            for session in reversed(list(self.sessions.values())):
                if session.key == key and session.state is State.DIFFERS:
                    raise _accounts_differ(session)
                if session.key == key and session.takes_calls(self.clock()):
                    return session
        return None

    def check(self, amount: int, more: int, session: Session | None = None) -> None:
        """Raises `LimitExceeded` if a call of `amount`, holding `more` than now, breaks a limit."""
        bounds = self.bounds
        if amount > bounds.per_request:
            raise exceeded("per_request", bounds.per_request, amount)
        with self.lock:
            spent_in_all = self.spent()
        if spent_in_all + more > bounds.total:
            raise exceeded("total", bounds.total, amount)
        spent = 0 if session is None else session.spent
        if bounds.session is not None and spent + more > bounds.session:
            raise exceeded("session", bounds.session, amount)

    def max_open(self, session: Session) -> int:
        """How much of a session may be open at once."""
        if self.bounds.max_open is not None:
            return self.bounds.max_open
        return session.target // 2

    # Signing.

    def sign(
        self, session: Session, offer: Offer, subject: Subject, call: Call | None
    ) -> tuple[Call, Form] | None:
        """Holds and signs a call, or one more form of `call`; None means that it waits its turn.

        Raises `LimitExceeded`, `AccountsDiffer`, or `Stale` when cover or another session is due.
        """
        self._check_process()
        with self.lock:
            held = session.held_by(call)
            more = max(0, offer.terms.amount - held)
            self.check(offer.terms.amount, more, session)
            if session.state is State.DIFFERS:
                raise _accounts_differ(session)
            if not session.takes_calls(self.clock()) or more > session.rest:
                raise Stale
            if session.held > held and session.held + more > self.max_open(session):
                return None
            if not session.proven and session.busy(call):
                return None
            return self._hold(session, offer, subject, call)

    def _hold(
        self, session: Session, offer: Offer, subject: Subject, call: Call | None
    ) -> tuple[Call, Form]:
        call, new = call or Call(session, _new_seq(session), subject.url), call is None
        session.hold(call, offer.terms.amount)
        # Headroom of calls that came cheaper is used up before the total is raised.
        session.cumulative = Atomic(max(session.cumulative, session.spent))
        form = self._form(session, offer, subject, call.seq)
        call.expires = max(call.expires, form.expires)
        try:
            self.memory.save(session, opened=call)
        except sqlite3.Error as error:
            if new:
                session.drop(call)
            raise LocalError(f"the wallet file cannot be written: {error}") from None
        call.forms.append(form)
        return call, form

    def _check_process(self) -> None:
        # A forked copy would spend every limit a second time, and sign from the same memory.
        if os.getpid() != self._process:
            raise ConfigurationError("this wallet belongs to another process: open one in each")

    def sign_control(self, session: Session, offer: Offer, subject: Subject) -> str:
        """Signs a control request: a voucher for nothing, under the total as it stands."""
        with self.lock:
            return self.header(session, self._form(session, offer, subject, _new_seq(session)))

    def _form(self, session: Session, offer: Offer, subject: Subject, seq: int) -> Form:
        terms = offer.terms
        expires = int(self.clock() * 1000) + EXPIRES_MS
        bound = BoundRequest(
            binding=BIND_REQUEST if subject.body_hash is None else BIND_BODY,
            method=subject.method,
            origin=subject.origin,
            target=subject.target,
            body_hash=subject.body_hash or NO_BODY_HASH,
            amount=terms.amount,
            expires=expires,
            terms_id=terms.id,
        )
        voucher = Voucher(
            terms.network_id, session.id, seq, session.cumulative, hash_request(bound)
        )
        return Form(sign_voucher(voucher, session.secret), offer, bound.binding, expires)

    def header(self, session: Session, form: Form) -> str:
        """Writes `PAYMENT-SIGNATURE`, with the newest token: it is not part of what is signed."""
        payment = PaymentPayload(
            x402_version=2,
            payload=EscrowPayload(
                voucher=form.signed.wire,
                token=session.token,
                expires=form.expires,
                binding=form.binding,
            ),
            accepted=form.offer.accepts,
        )
        return headers.encode_header(payment)

    # Learning what became of it.

    def settle(self, call: Call, charge: int, word: Word | None = None) -> None:
        """Books what a call cost, once; compares the provider's total when nothing is open."""
        session = call.session
        with self.lock:
            if not session.drop(call):
                return
            booked = call.charge = call.paid.charge = Atomic(min(charge, call.hold))
            session.charged = Atomic(session.charged + booked)
            if word is not None:
                session.proven = True
                _note_totals(session, word)
            if charge > call.hold or (word is not None and differs(session)):
                self._differ(session)
            self._remember(session, dropped=[call])
        log.info("paid %s for %s (session %s)", display(booked), call.url, session.name)
        self.signal.notify()
        if self.on_payment is not None:
            self.on_payment(call.paid)

    def free(self, call: Call) -> None:
        """Gives up the hold of a call that can never be charged."""
        with self.lock:
            if call.session.drop(call):
                self._remember(call.session, dropped=[call])
        self.signal.notify()

    def leave(self, call: Call) -> None:
        """Notes that nobody waits for this call; it stays held until its charge is known."""
        call.in_flight = False
        self.signal.notify()

    def adopt(self, session: Session, form: Form, word: Word) -> None:
        """Takes over a corrective 402 if it proves that our memory was lost, else stops signing.

        The proof is a voucher under our own key, above the highest we remember: only we can have
        signed it. Nothing a provider merely says ever raises what we sign. A `form` that was signed
        before we learnt better is no difference: the next one will be.
        """
        with self.lock:
            if form.signed.voucher.cumulative < session.cumulative:
                return
            if not _proves_loss(session, word):
                self._differ(session)
                self._remember(session)
                raise _accounts_differ(session)
            cumulative = parse_voucher(word.voucher or "").voucher.cumulative
            log.warning("session %s: our memory was behind; adopted our own voucher", session.name)
            more = (word.open_total or 0) - session.unattributed
            session.cumulative, session.charged = cumulative, word.charged_total or session.charged
            session.unattributed = Atomic(session.unattributed + more)
            session.held = Atomic(session.held + more)
            session.total_seen = session.charged
            session.proven = True
            self._remember(session)

    def begin(self, opening: Opening) -> None:
        """Remembers an opening; what cannot be remembered is not sent."""
        self._check_process()
        with self.lock:
            try:
                self.memory.begin(opening)
            except sqlite3.Error as error:
                raise LocalError(f"the wallet file cannot be written: {error}") from None
            self.openings[opening.pays_for] = opening

    def abandon(self, opening: Opening) -> None:
        """Forgets an opening that the escrow refused."""
        with self.lock:
            self.openings.pop(opening.pays_for, None)
            try:
                self.memory.drop(opening)
            except sqlite3.Error:
                log.exception("the wallet file cannot be written; it shows an opening too many")

    def add(self, session: Session, opening: Opening) -> Session:
        """Takes up the session that an opening led to, once; returns it."""
        with self.lock:
            self.openings.pop(opening.pays_for, None)
            session = self.sessions.setdefault(session.id, session)
            self._remember(session, begun=opening)
        self.signal.notify()
        return session

    def keep(self, session: Session) -> None:
        """Remembers a session as it stands now."""
        with self.lock:
            self._remember(session)
        self.signal.notify()

    def renew(self, session: Session, record: EscrowRecord) -> None:
        """Takes over what the escrow says of an open session: it only ever grows."""
        with self.lock:
            session.token = record.token or session.token
            session.deposit = max(session.deposit, record.deposit)
            session.expires_at = max(session.expires_at, record.expires_at)
        self.keep(session)

    def end(self, session: Session) -> None:
        """Signs no new calls in a session; what is open still settles."""
        if session.state is State.OPEN:
            session.state = State.ENDED
        self.keep(session)

    def close(self, session: Session, charged: int | None) -> None:
        """Closes the books of a session; `charged` is the provider's signed final figure."""
        with self.lock:
            calls: Iterable[Call] = ()
            if charged is not None:
                calls = list(session.calls.values())
                session.calls.clear()
                session.held = session.unattributed = Atomic(0)
                # The provider has signed for this figure, and the escrow paid it out.
                session.charged = session.total_seen = session.cumulative = Atomic(charged)
            session.state = State.CLOSED
            self._remember(session, dropped=calls)
        self.signal.notify()

    def _remember(
        self, session: Session, *, dropped: Iterable[Call] = (), begun: Opening | None = None
    ) -> None:
        """Writes what only lowers what we believe to owe: a failure costs memory, not an answer."""
        try:
            self.memory.save(session, dropped=dropped, begun=begun)
        except sqlite3.Error:
            log.exception("the wallet file cannot be written; it shows more held than there is")

    def differ(self, session: Session) -> None:
        """Stops signing in a session whose two accounts do not agree."""
        self._differ(session)
        self.keep(session)

    def _differ(self, session: Session) -> None:
        session.state = State.DIFFERS
        log.error("session %s: the provider's account is not ours; not signing", session.name)


def _new_seq(session: Session) -> int:
    # 63 random bits: nobody can guess or burn the identity of a call to come.
    seq = secrets.randbits(63)
    return _new_seq(session) if seq in session.calls else seq


def _note_totals(session: Session, word: Word) -> None:
    """Takes in the totals of a settled answer."""
    session.total_seen = max(session.total_seen, word.charged_total or session.charged)
    if session.unattributed and not session.calls and word.open_total == 0:
        # What we had forgotten is settled now: its charge is what our own sum lacks.
        lacking = min(max(0, session.total_seen - session.charged), session.unattributed)
        session.charged = Atomic(session.charged + lacking)
        session.held = Atomic(session.held - session.unattributed)
        session.unattributed = Atomic(0)


def _proves_loss(session: Session, word: Word) -> bool:
    try:
        signed = parse_voucher(word.voucher or "")
    except Malformed:
        return False
    voucher, charged, opened = signed.voucher, word.charged_total, word.open_total
    return (
        charged is not None
        and opened is not None
        and voucher.session == session.id
        and voucher.network == session.offer.terms.network_id
        and session.cumulative < voucher.cumulative <= session.deposit
        and session.charged <= charged
        and charged + opened <= voucher.cumulative
        and verify_voucher(signed, public_key(session.seed))
    )


def _accounts_differ(session: Session) -> AccountsDiffer:
    return AccountsDiffer(
        f"the provider's account of {session.name} is not ours: nothing more is signed in it"
    )

"""What a wallet may spend, and every signature it gives.

1. Nothing is signed before its amount is held in every limit; a refused call is held in none.
2. The memory has the raised total before the voucher exists: of several processes on one file each
   decides in a transaction of its own, so that no two of them use the same room.
"""

import os
import secrets
from collections.abc import Callable
from functools import lru_cache, partial

from x402mw.core.amounts import Atomic
from x402mw.core.errors import ConfigurationError, PaymentOutcomeUnknown
from x402mw.core.strict import b64_encode, dumps
from x402mw.core.vouchers import (
    BIND_BODY,
    BIND_REQUEST,
    NO_BODY_HASH,
    BoundRequest,
    Voucher,
    hash_request,
    sign_voucher,
)
from x402mw_client.accounts import accounts_differ
from x402mw_client.books import Books
from x402mw_client.events import Events
from x402mw_client.limits import Bounds, Limits, exceeded
from x402mw_client.memory import Memory
from x402mw_client.sessions import Call, Form, Offer, Session, Stale, State, Subject

EXPIRES_MS = 300_000


_quoted = lru_cache(maxsize=256)(dumps)


class Purse(Books):
    """The money side of a wallet: its books, its limits and its signatures."""

    def __init__(
        self,
        limits: Limits,
        memory: Memory,
        clock: Callable[[], float],
        read_offer: Callable[[str], Offer],
        events: Events,
        receipt_every: int | None = None,
    ) -> None:
        super().__init__(memory, clock, read_offer, events, receipt_every)
        self.bounds = Bounds.of(limits)
        self._process = os.getpid()

    def check(self, amount: int, more: int, session: Session | None = None) -> None:
        """Raises `LimitExceeded` if a call of `amount`, holding `more` than now, breaks a limit."""
        bounds = self.bounds
        if amount > bounds.per_request:
            raise exceeded("per_request", bounds.per_request, amount)
        if self.spent() + more > bounds.total:
            raise exceeded("total", bounds.total, amount)
        spent = 0 if session is None else session.spent
        if bounds.session is not None and spent + more > bounds.session:
            raise exceeded("session", bounds.session, amount)

    def max_open(self, session: Session) -> int:
        """How much of a session may be open at once."""
        if self.bounds.max_open is not None:
            return self.bounds.max_open
        return session.target // 2

    def sign(
        self, session: Session, offer: Offer, subject: Subject, call: Call | None
    ) -> tuple[Call, Form] | None:
        """Holds and signs a call, or one more form of `call`; None means that it waits its turn.

        Raises `LimitExceeded`, `AccountsDiffer`, or `Stale` when cover or another session is due;
        `Busy` or `LocalError` when the wallet file cannot be written.
        """
        self.check_process()
        expires = int(self.clock() * 1000) + EXPIRES_MS
        with self.lock:
            held = self.change(partial(self._hold, session, offer, subject, call, expires))
            if held is None:
                return None
            call, amount, cumulative = held
            session.keep(call, amount, expires)
        form = self._form(session, offer, subject, call.seq, cumulative, expires)
        call.forms.append(form)
        return call, form

    def _hold(
        self, session: Session, offer: Offer, subject: Subject, call: Call | None, expires: int
    ) -> tuple[Call, Atomic, Atomic] | None:
        """Holds what a call needs; returns it, what it holds now, and the total to sign."""
        held = session.held_by(call)
        more = max(0, offer.terms.amount - held)
        self.check(offer.terms.amount, more, session)
        if session.state is State.DIFFERS:
            raise accounts_differ(session)
        if not session.takes_calls(self.clock()) or more > session.rest:
            raise Stale
        if session.held > held and session.held + more > self.max_open(session):
            return None
        if not session.proven and self._others_ask(session, call):
            return None
        new = call is None or call.seq not in session.calls
        call = call or Call(session, _new_seq(session), subject.url)
        amount = Atomic(held + more)
        if not self.memory.hold(call, amount, max(call.expires, expires), new=new):
            session.forget(call)
            raise PaymentOutcomeUnknown("another process of this wallet has settled the call")
        session.held = Atomic(session.held + more)
        # Headroom of calls that came cheaper is used up before the total is raised.
        session.cumulative = Atomic(max(session.cumulative, session.spent))
        self.memory.come_back()
        self.save(session)
        return call, amount, session.cumulative

    def _others_ask(self, session: Session, call: Call | None) -> bool:
        return session.busy(call) or self.memory.busy_elsewhere(session)

    @property
    def forked(self) -> bool:
        """Whether this is a copy that a fork made: nothing here is its own."""
        return os.getpid() != self._process

    def check_process(self) -> None:
        """Refuses to work in a forked copy: it would sign from the same memory."""
        if self.forked:
            raise ConfigurationError("this wallet belongs to another process: open one in each")

    def sign_control(self, session: Session, offer: Offer, subject: Subject) -> str:
        """Signs a control request: a voucher for nothing, under the total as it stands."""
        self.look()
        expires = int(self.clock() * 1000) + EXPIRES_MS
        seq, cumulative = _new_seq(session), session.cumulative
        return self.header(session, self._form(session, offer, subject, seq, cumulative, expires))

    def _form(
        self,
        session: Session,
        offer: Offer,
        subject: Subject,
        seq: int,
        cumulative: Atomic,
        expires: int,
    ) -> Form:
        terms = offer.terms
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
        voucher = Voucher(terms.network_id, session.id, seq, cumulative, hash_request(bound))
        return Form(sign_voucher(voucher, session.secret), offer, bound.binding, expires)

    def header(self, session: Session, form: Form) -> str:
        """Writes `PAYMENT-SIGNATURE`, with the newest token: it is not part of what is signed."""
        # The token and the provider's own words are the same in many payments: written once.
        return b64_encode(
            b'{"x402Version":2,"payload":{"voucher":"%b","token":%b,"expires":%d,"binding":%d},'
            b'"accepted":%b}'
            % (
                form.signed.wire.encode(),
                _quoted(session.token),
                form.expires,
                form.binding,
                form.offer.accepted,
            )
        )


def _new_seq(session: Session) -> int:
    # 63 random bits: nobody can guess or burn the identity of a call to come.
    seq = secrets.randbits(63)
    return _new_seq(session) if seq in session.calls else seq

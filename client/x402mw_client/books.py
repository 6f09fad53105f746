"""The books of a wallet: its sessions and openings, and what became of each call.

1. A change is one transaction of the memory (`change`): first what other processes changed is
   taken up, then the objects here are changed, and written.
2. One lock guards all of it, for threads and event loops alike; nothing is awaited inside.
3. What only lowers what we believe to owe never fails: it is booked with the next change.
"""

import logging
import sqlite3
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

from x402mw.core.amounts import ZERO, Atomic
from x402mw.core.errors import LocalError
from x402mw.core.vouchers import parse_voucher
from x402mw_client.accounts import accounts_differ, differs, note_totals, proves_loss
from x402mw_client.answers import Word
from x402mw_client.events import Events, tell
from x402mw_client.memory import Busy, Memory, News, Row
from x402mw_client.records import EscrowRecord
from x402mw_client.sessions import (
    Call,
    Form,
    Offer,
    Opening,
    Past,
    Session,
    State,
    newer_token,
)
from x402mw_client.totals import WorstSum
from x402mw_client.waiting import Signal
from x402mw_client.walletfile import COLUMNS

POLL_SECONDS = 0.05
"""How often who waits looks for what another process did, which nobody tells."""
KEEP_SECONDS = 7 * 86_400
"""A session that was never closed is forgotten this long after its end at the escrow."""
Key = tuple[str, str, bytes]
T = TypeVar("T")


class Books:
    """All that a wallet knows of its money. `read_offer` reads an offer that was kept."""

    def __init__(
        self,
        memory: Memory,
        clock: Callable[[], float],
        read_offer: Callable[[str], Offer],
        events: Events,
        receipt_every: int | None = None,
    ) -> None:
        self.memory = memory
        self.clock = clock
        self.events = events
        self._receipt_every = receipt_every
        self._receipts_due: list[Session] = []
        self.signal = Signal(POLL_SECONDS if memory.shared else None)
        self.lock = threading.RLock()
        self.sessions: dict[bytes, Session] = {}
        self._by_key: dict[Key, list[Session]] = {}
        self._worst = WorstSum()
        self.openings: dict[Key, Opening] = {}
        self.past = Past()
        self._read_offer = read_offer
        self._late: list[Callable[[], object]] = []

    # Changing, and looking.

    def change(self, book: Callable[[], T], *, durable: bool = False) -> T:
        """Makes one change of the books; raises `Busy`, or `LocalError` if it cannot be written."""
        with self.lock:
            try:
                with self.memory.transaction(durable=durable):
                    self._catch_up()
                    for late in self._late:
                        late()
                    result = book()
                self._late.clear()
            except sqlite3.Error as error:
                raise LocalError(f"the wallet file cannot be written: {error}") from None
            return result

    def look(self) -> None:
        """Takes up what other processes changed; if that fails, what is known stands."""
        with self.lock:
            try:
                self._catch_up()
            except sqlite3.Error:
                return

    def _catch_up(self) -> None:
        news = self.memory.news()
        if news is not None:
            self._take_up(news)

    def _take_up(self, news: News) -> None:
        found = {row[0]: row for row in news.sessions}
        if news.everything:
            for gone in self.sessions.keys() - found.keys():
                # A story may still have it: it signs nothing in what the others have forgotten.
                self.sessions[gone].state = State.CLOSED
                self._forget(self.sessions[gone])
        for name, row in found.items():
            session = self.sessions.get(name)
            if session is None:
                session = self._know(self._new_session(row))
            session.state = State(row[4])
            for column, value in zip(COLUMNS[5:], row[5:], strict=True):
                setattr(session, column, value)
            self._worst.changed(session)
        openings = (self._read_opening(row) for row in news.openings)
        self.openings = {opening.pays_for: opening for opening in openings}
        self.past = news.past

    def _know(self, session: Session) -> Session:
        self.sessions[session.id] = session
        self._by_key.setdefault(session.key, []).append(session)
        self._worst.changed(session)
        return session

    def _forget(self, session: Session) -> None:
        del self.sessions[session.id]
        self._worst.gone(session)
        alike = self._by_key[session.key]
        alike.remove(session)
        if not alike:
            del self._by_key[session.key]

    def save(self, session: Session) -> None:
        """Whatever changes a session ends here."""
        self._worst.changed(session)
        self.memory.save(session)

    def _new_session(self, row: Row) -> Session:
        offer = self._read_offer(row[2])
        return Session(row[0], row[1], offer, row[3], row[5], row[6], row[7], row[8])

    def _read_opening(self, row: Row) -> Opening:
        key, origin, offer, *rest = row
        return Opening(key, origin, self._read_offer(offer), *rest)

    def recover(self) -> None:
        """Finds the calls that nobody waits for any more, also those of processes that died."""
        if not self.memory.shared:
            return
        with suppress(Busy, LocalError):
            self.change(self._recover)

    def _recover(self) -> None:
        self.memory.recover()
        for name, seq, url, hold, expires in self.memory.doubts():
            session = self.sessions.get(name)
            if session is not None and seq not in session.calls:
                call = Call(session, seq, url, hold, expires, in_flight=False)
                session.calls[seq] = session.doubtful[seq] = call

    def spent(self) -> int:
        """What all sessions ever may have cost (`Session.at_worst`)."""
        now = self.clock()
        with self.lock:
            return self.past.worst + self._worst.at(now, self.sessions)

    def usable(self, key: Key) -> Session | None:
        """The session that may pay for new calls, if there is one."""
        now = self.clock()
        with self.lock:
            self.look()
            for session in reversed(self._by_key.get(key, ())):
                if session.state is State.DIFFERS:
                    raise accounts_differ(session)
                if session.takes_calls(now):
                    return session
        return None

    # What became of a call.

    def settle(self, call: Call, charge: int, word: Word | None = None) -> None:
        """Books what a call cost, once; compares the provider's total when nothing is open."""
        with self.lock:
            if call.charge is not None:
                return
            call.charge = call.paid.charge = Atomic(min(charge, call.hold))
        self._surely(partial(self._settle, call, charge, word))
        self.signal.notify()
        self.events.paid(call)

    def _settle(self, call: Call, charge: int, word: Word | None) -> None:
        session, hold = call.session, self._take(call)
        if hold is None:
            return
        session.charged = Atomic(session.charged + min(charge, hold))
        self._count(session)
        if word is not None:
            session.proven = True
            note_totals(session, word)
        if charge > hold or (word is not None and differs(session)):
            self._turn(session, State.DIFFERS, *State)
        self.save(session)

    def _count(self, session: Session) -> None:
        """Counts a charged call: whichever process counts the last one asks for the receipt."""
        session.unreceipted += 1
        if self._receipt_every is not None and session.unreceipted >= self._receipt_every:
            session.unreceipted = 0
            self._receipts_due.append(session)

    def receipts_due(self) -> list[Session]:
        """The sessions whose provider is to be asked for a receipt now."""
        if not self._receipts_due:
            return []
        with self.lock:
            due, self._receipts_due = self._receipts_due, []
            return due

    def free(self, call: Call) -> None:
        """Gives up the hold of a call that can never be charged."""
        self._surely(partial(self._free, call))
        self.signal.notify()

    def _free(self, call: Call) -> None:
        if self._take(call) is not None:
            self.save(call.session)

    def _take(self, call: Call) -> Atomic | None:
        """Takes a call off the books; None if it is off already, here or by another process."""
        session = call.session
        session.forget(call)
        hold = self.memory.drop(call)
        if hold is not None:
            session.held = Atomic(session.held - hold)
        return hold

    def _surely(self, book: Callable[[], object]) -> None:
        """Books what only lowers what we believe to owe: a failure costs time, not an answer."""
        with self.lock:
            try:
                self.change(book)
            except (Busy, LocalError) as error:
                self._late.append(book)
                text = f"{error}; for now the file shows more held than there is"
                tell(logging.WARNING, "file_unwritable", text)

    def leave(self, call: Call) -> None:
        """Notes that nobody waits for this call; it stays held until its charge is known."""
        call.in_flight = False
        with self.lock:
            if call.seq not in call.session.calls:
                return
            call.session.doubtful[call.seq] = call
            if self.memory.shared:
                with suppress(Busy, LocalError):
                    self.change(partial(self.memory.leave, call))
        self.signal.notify()

    def take_up_again(self, call: Call) -> None:
        """Notes that somebody waits for this call again."""
        with self.lock:
            call.in_flight = True
            call.session.doubtful.pop(call.seq, None)

    def adopt(self, session: Session, form: Form, word: Word) -> None:
        """Takes over a corrective 402 if it proves that our memory was lost, else stops signing.

        The proof is a voucher under our own key, above the highest we remember: only we can have
        signed it. Nothing a provider merely says ever raises what we sign. A `form` that was signed
        before we learnt better is no difference: the next one will be.
        """
        self.change(partial(self._adopt, session, form, word))

    def _adopt(self, session: Session, form: Form, word: Word) -> None:
        if form.signed.voucher.cumulative < session.cumulative:
            return
        if not proves_loss(session, word):
            self._turn(session, State.DIFFERS, *State)
            raise accounts_differ(session)
        cumulative = parse_voucher(word.voucher or "").voucher.cumulative
        text = f"session {session.name}: our memory was behind; adopted our own voucher"
        tell(logging.WARNING, "memory_restored", text, session=session.name)
        more = (word.open_total or 0) - session.unattributed
        session.cumulative, session.charged = cumulative, word.charged_total or session.charged
        session.unattributed = Atomic(session.unattributed + more)
        session.held = Atomic(session.held + more)
        session.total_seen = session.charged
        session.proven = True
        self.save(session)

    # Sessions come and go.

    def begin(self, opening: Opening) -> None:
        """Remembers an opening; what cannot be remembered is not sent."""
        self.change(partial(self._begin, opening), durable=True)

    def _begin(self, opening: Opening) -> None:
        self.memory.come_back()
        self.memory.begin(opening)
        self.openings[opening.pays_for] = opening

    def abandon(self, opening: Opening) -> None:
        """Forgets an opening that the escrow refused."""
        self.openings.pop(opening.pays_for, None)
        self._surely(partial(self._abandon, opening))

    def _abandon(self, opening: Opening) -> None:
        self.openings.pop(opening.pays_for, None)
        self.memory.abandon(opening)

    def add(self, session: Session, opening: Opening) -> Session:
        """Takes up the session that an opening led to, once; returns it."""
        known = self.change(partial(self._add, session, opening), durable=True)
        self.signal.notify()
        return known

    def _add(self, session: Session, opening: Opening) -> Session:
        self._abandon(opening)
        known = self.sessions.get(session.id)
        if known is None:
            self.memory.add(session)
            known = self._know(session)
        self._forget_old()
        return known

    def _forget_old(self) -> None:
        """Forgets sessions that are over for good; only their sums are kept."""
        now = self.clock()
        for session in list(self.sessions.values()):
            final = session.state is State.CLOSED and session.held == 0
            old = session.state is not State.DIFFERS and now > session.expires_at + KEEP_SECONDS
            if (final or old) and not session.busy(None):
                charged = Atomic(self.past.charged + session.charged)
                worst = Atomic(self.past.worst + session.at_worst(now))
                self.past = Past(charged, worst)
                self.memory.fold(session, self.past)
                self._forget(session)

    def renew(self, session: Session, record: EscrowRecord) -> None:
        """Takes over what the escrow says of an open session: it only ever grows."""
        self.change(partial(self._renew, session, record))
        self.signal.notify()

    def _renew(self, session: Session, record: EscrowRecord) -> None:
        session.token = newer_token(session, record.token, self.clock())
        session.deposit = max(session.deposit, record.deposit)
        session.expires_at = max(session.expires_at, record.expires_at)
        self.save(session)

    def aim(self, session: Session, target: Atomic) -> None:
        """Raises what top-ups fill the rest up to; what cannot be remembered locks nothing."""
        self.change(partial(self._aim, session, target))

    def _aim(self, session: Session, target: Atomic) -> None:
        session.target = max(session.target, target)
        self.save(session)

    def end(self, session: Session) -> None:
        """Signs no new calls in a session; what is open still settles."""
        self._surely(partial(self._turn, session, State.ENDED, State.OPEN))
        self.signal.notify()

    def differ(self, session: Session) -> None:
        """Stops signing in a session whose two accounts do not agree."""
        self._surely(partial(self._turn, session, State.DIFFERS, *State))
        self.signal.notify()

    def _turn(self, session: Session, state: State, *before: State) -> None:
        if session.state in before:
            session.state = state
            self.save(session)
        if state is State.DIFFERS:
            text = f"session {session.name}: the provider's account is not ours; not signing"
            tell(logging.ERROR, "accounts_differ", text, session=session.name)

    def close(self, session: Session, charged: int | None) -> None:
        """Closes the books of a session; `charged` is the provider's signed final figure."""
        self._surely(partial(self._close, session, charged))
        self.signal.notify()

    def _close(self, session: Session, charged: int | None) -> None:
        if charged is not None:
            session.calls.clear()
            session.doubtful.clear()
            self.memory.drop_all(session)
            session.held = session.unattributed = ZERO
            # The provider has signed for this figure, and the escrow paid it out.
            session.charged = session.total_seen = session.cumulative = Atomic(charged)
        self._turn(session, State.CLOSED, *State)

    def leave_to_others(self) -> bool:
        """Notes that this process is about to end; whether others go on with the sessions."""
        return self.change(self.memory.leave_to_others)

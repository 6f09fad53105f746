"""The pay-and-retry story, told once for async and sync transports.

    terms unknown:  probe -> 402 -> session -> sign -> send -> follow the answer
    terms known:                    session -> sign -> send -> follow the answer

`answers` says what an answer means; `Payment` does what follows from it. Until a call's charge is
certain its amount stays held, and every further voucher for it keeps its seq, so it can never be
paid twice (`docs/protocol.md`, Buyer).
"""

from typing import Final, Protocol

import httpx

from x402mw.core.errors import (
    AccountsDiffer,
    BodyNotReplayable,
    LimitExceeded,
    PaidOutcomeGone,
    PaymentOutcomeUnknown,
    PaymentRefused,
)
from x402mw.core.vouchers import BIND_REQUEST
from x402mw_client import answers
from x402mw_client.answers import Verdict, Word, classify, read_word, retry_after
from x402mw_client.control import learn_charge, resolve_doubts
from x402mw_client.memory import Busy
from x402mw_client.probing import learn, probe
from x402mw_client.secure import check_secure
from x402mw_client.sessions import Call, Form, Offer, Session, Stale
from x402mw_client.state import WalletState
from x402mw_client.steps import (
    After,
    Outgoing,
    Read,
    Send,
    Sleep,
    Story,
    Take,
    Wait,
    patiently,
)
from x402mw_client.upkeep import funded_session, renew_token

TURN_SECONDS = 60.0
PAUSE_MIN_SECONDS = 0.05
RESEND_PAUSES: Final = (0.05, 0.25, 1.0)
SIGNINGS_MAX = 4
"""The first signing and three more."""
STALE_MAX = 8
RUNNING_SECONDS_MAX = 600.0
"""Terms may allow longer calls; who waits for one resumes it (`PaymentHandle`)."""

PAYMENT = "x402mw_payment"
"""The key of `response.extensions` under which the caller finds its `Paid`; of an answer that
streams its `charge` is filled in when the body has ended."""

# Nothing of the request has left when one of these is raised.
NOT_SENT: Final = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.UnsupportedProtocol,
)
TOKEN_REASONS: Final = ("token", "token_expired", "token_retired")
RENEWABLE: Final = ("session_closing", "voucher_expires")
"""Final refusals of these bytes after which the call may still be paid by others."""


def fetch(wallet: WalletState, request: Outgoing) -> Story[httpx.Response]:
    """Sends a request of the caller, and pays for it if that is asked and allowed."""
    found: Offer | httpx.Response | None = wallet.offers.find(request)
    if found is None:
        found = yield from probe(wallet, request)
    if isinstance(found, httpx.Response):
        return found
    return (yield from Payment(wallet, request, found).run())


class Payment:
    """One logical request on its way.

    `lost`: some sending of it had no answer. `moved`: another session pays for it than the first.
    `renamed`: the provider named another form than the one that was sent.
    """

    def __init__(self, wallet: WalletState, request: Outgoing, offer: Offer) -> None:
        self.wallet = wallet
        self.request = request
        self.offer = offer
        self.call: Call | None = None
        self.form: Form | None = None
        self.signings = self.sendings = self.resends = 0
        self.slept = 0.0
        self.lost = self.moved = self.renamed = False

    def run(self) -> Story[httpx.Response]:
        """Signs and sends until an answer can go to the caller, or raises what became of it."""
        try:
            while True:
                self._check_request()
                if self.call is None or self.form is None:
                    self.call, self.form = yield from self._sign()
                answer = yield from self._send(self.call, self.form)
                word = read_word(answer, self.call.seq)
                verdict = classify(answer, word)
                done = yield from self._follow(verdict, self.call, answer, word)
                if done is not None:
                    return done
        finally:
            if self.call is not None:
                self.wallet.purse.leave(self.call)

    def resume(self) -> Story[httpx.Response]:
        """Takes up a payment whose outcome was unknown: the same bytes, never a second charge."""
        self.signings = self.resends = 0
        self.slept = 0.0
        if self.call is not None:
            self.wallet.purse.take_up_again(self.call)
        return (yield from self.run())

    def _check_request(self) -> None:
        check_secure(self.request.request.url)
        if not self.request.replayable and self.offer.terms.binding < BIND_REQUEST:
            raise BodyNotReplayable(
                f"the body of this request is longer than {self.wallet.buffer_limit} bytes and"
                " cannot be sent twice, but the route binds bodies; pass it as bytes"
            )

    def _check_replay(self) -> None:
        if self.sendings and not self.request.replayable:
            raise self._unknown("the body of the request cannot be sent again")

    # Signing.

    def _sign(self) -> Story[tuple[Call, Form]]:
        if self.signings == SIGNINGS_MAX:
            message = "the provider refused every form of the payment"
            raise PaymentRefused(message) if self.call is None else self._unknown(message)
        self.signings += 1
        for _ in range(STALE_MAX):
            try:
                session = yield from funded_session(
                    self.wallet, self.request.origin, self.offer, self.call
                )
                return (yield from self._sign_in(session))
            except Stale:
                continue
            except LimitExceeded:
                # A limit may only seem reached: calls may be held whose charge can be asked for.
                if not (yield from resolve_doubts(self.wallet, self.wallet.clock())):
                    raise
        raise LimitExceeded("session", "no session could take this call")

    def _sign_in(self, session: Session) -> Story[tuple[Call, Form]]:
        if self.call is not None and self.call.session is not session:
            raise self._unknown("the session of this payment takes no more calls")
        subject, purse = self.request.subject, self.wallet.purse
        signed = yield from patiently(lambda: purse.sign(session, self.offer, subject, self.call))
        if signed is None:
            yield from resolve_doubts(self.wallet, self.wallet.clock())
            signed = yield Wait(lambda: self._try_to_sign(session), TURN_SECONDS)
        if signed is None:
            raise LimitExceeded("max_open", "too much was open with this provider for too long")
        return signed[0], signed[1]

    def _try_to_sign(self, session: Session) -> tuple[Call, Form] | None:
        try:
            return self.wallet.purse.sign(session, self.offer, self.request.subject, self.call)
        except Busy:
            return None

    # Sending, and what follows.

    def _send(self, call: Call, form: Form) -> Story[httpx.Response | None]:
        """Sends one form; None if the answer was lost."""
        self._check_replay()
        self.sendings += 1
        try:
            answer: httpx.Response = yield Send(self.wallet.purse.header(call.session, form))
            if self.request.replayable and not answer.is_closed and answers.is_short(answer):
                # One that breaks off in its body is as lost as one that never came.
                yield Take(answer)
        except NOT_SENT:
            if self.sendings > 1:
                return None
            self.wallet.purse.free(call)
            raise
        except httpx.TransportError:
            return None
        return answer

    def _follow(
        self, verdict: Verdict, call: Call, answer: httpx.Response | None, word: Word | None
    ) -> Story[httpx.Response | None]:
        """Does what the table says; returns the answer once it may go to the caller."""
        if answer is None or verdict is Verdict.LOST:
            yield from self._send_again(answer)
            return None
        if word is None:
            return (yield from self._foreign(call, answer))
        if verdict is Verdict.FORGOTTEN and self.lost:
            raise self._unknown("the provider no longer knows what became of the call")
        if verdict in (Verdict.SETTLED, Verdict.OPEN, Verdict.REJECTED, Verdict.FORGOTTEN):
            return (yield from self._deliver(verdict, call, answer, word))
        if verdict is Verdict.REPLACED:
            return (yield from self._replaced(call))
        yield from self._go_on(verdict, call, answer, word)
        return None

    def _deliver(
        self, verdict: Verdict, call: Call, answer: httpx.Response, word: Word
    ) -> Story[httpx.Response]:
        if verdict in (Verdict.REJECTED, Verdict.FORGOTTEN):
            self.wallet.purse.free(call)
            return answer
        answer.extensions[PAYMENT] = call.paid
        if verdict is Verdict.SETTLED:
            self.wallet.purse.settle(call, word.charge, word)
        else:
            call.session.proven = True
            asking = learn_charge(self.wallet, call)
            if answer.is_closed:
                yield from asking
            else:
                yield After(answer, asking)
        return answer

    def _go_on(
        self, verdict: Verdict, call: Call, answer: httpx.Response, word: Word
    ) -> Story[None]:
        match verdict:
            case Verdict.RUNNING:
                most = min(self.offer.terms.timeout_seconds, RUNNING_SECONDS_MAX)
                yield from self._wait(answer, most)
            case Verdict.LATER:
                yield from self._wait(answer, self.request.patience)
            case Verdict.SIGN_AGAIN:
                yield from self._refused(call, answer, word)
            case Verdict.OTHER_FORM:
                self._take_form(call, word)
            case Verdict.GONE:
                raise self._gone(call, word)

    def _send_again(self, answer: httpx.Response | None) -> Story[None]:
        self.lost = True
        if self.resends == len(RESEND_PAUSES):
            raise self._unknown("the answer to the payment was lost")
        left = self.request.patience - self.slept
        pause = max(RESEND_PAUSES[self.resends], min(left, retry_after(answer, 0)))
        self.resends += 1
        self.slept += pause
        self.wallet.events.resent(self.request.origin)
        yield Sleep(pause)

    def _foreign(self, call: Call, answer: httpx.Response) -> Story[httpx.Response]:
        """An answer without the provider's word stands, and the amount stays held."""
        if self.lost or not answers.may_be_not_priced(answer) or not self.request.replayable:
            return answer
        yield Read(answer)
        if not answers.says_not_priced(answer):
            return answer
        self.wallet.purse.free(call)
        self.wallet.offers.forget(self.request.origin, self.offer)
        unpaid: httpx.Response = yield Send(None)
        return unpaid

    def _wait(self, answer: httpx.Response, most: float) -> Story[None]:
        """Waits as long as the provider asks; the same bytes are sent next."""
        pause = max(PAUSE_MIN_SECONDS, retry_after(answer, 1.0))
        self.slept += pause
        if self.slept > most:
            raise self._unknown("the provider did not answer in time")
        yield Sleep(pause)

    def _take_form(self, call: Call, word: Word) -> None:
        """The provider admitted another form of this call: one of ours, or we cannot go on."""
        form = call.form_of(word.commitment)
        if form is None or form is self.form or self.renamed:
            self.wallet.purse.differ(call.session)
            raise AccountsDiffer("the provider says it admitted a voucher that was never signed")
        self.form, self.renamed = form, True

    def _gone(self, call: Call, word: Word) -> PaidOutcomeGone | PaymentRefused:
        self.wallet.purse.settle(call, word.charge, word)
        if word.charge == 0:
            # The call ended without a charge and will never run again; the caller may ask anew.
            return PaymentRefused("the call was given up by the provider", reason=word.reason)
        return PaidOutcomeGone(
            "the call was paid, but its answer is not kept", charge=min(word.charge, call.hold)
        )

    def _refused(self, call: Call, answer: httpx.Response, word: Word) -> Story[None]:
        """Follows the fresh terms of a 402, with the same seq."""
        if call.charge is not None:
            # It was settled, and its row is gone since: another form would pay a second time.
            raise PaidOutcomeGone(
                "the call was paid, but its answer is not kept", charge=call.charge
            )
        fresh = yield from learn(self.wallet, self.request, answer)
        self.offer = fresh or self.offer
        if self.offer.terms.journal != call.session.offer.terms.journal:
            self._leave_session(call, "journal_replaced")
        elif word.final and word.reason not in RENEWABLE:
            self.wallet.purse.free(call)
            raise PaymentRefused(f"the provider refused: {word.reason}", reason=word.reason)
        elif word.reason == "session_closing":
            self.wallet.purse.end(call.session)
            self._start_over(call, word.reason)
        elif word.reason == "cover":
            form = call.forms[-1]
            yield from patiently(lambda: self.wallet.purse.adopt(call.session, form, word))
        elif word.reason in TOKEN_REASONS:
            yield from renew_token(self.wallet, call.session, urgent=True)
        self.form = None

    def _replaced(self, call: Call) -> Story[httpx.Response | None]:
        """Asks the new journal for its terms; if there is no price any more, that was the call."""
        self._leave_session(call, "journal_replaced")
        self._check_replay()
        self.wallet.offers.forget(self.request.origin, self.offer)
        answer: httpx.Response = yield Send(None)
        fresh = yield from learn(self.wallet, self.request, answer)
        if fresh is None:
            return answer
        self.offer = fresh
        return None

    def _leave_session(self, call: Call, reason: str) -> None:
        """The session takes no calls. Only what was never lost may be paid from another."""
        self.wallet.purse.end(call.session)
        if self.lost:
            raise self._unknown("the provider's book was replaced while the answer was lost")
        self._start_over(call, reason)

    def _start_over(self, call: Call, reason: str) -> None:
        """Lets another session pay: these bytes can never be admitted. Each locks money: once."""
        self.wallet.purse.free(call)
        self.call = self.form = None
        if self.moved:
            raise PaymentRefused(f"the provider refused two sessions: {reason}", reason=reason)
        self.moved, self.renamed = True, False

    def _unknown(self, message: str) -> PaymentOutcomeUnknown:
        return PaymentOutcomeUnknown(
            f"{message}; the call may still be executed and charged, once",
            handle=PaymentHandle(self),
        )


class AsyncResumer(Protocol):
    """What resumes payments in async code: `PaymentTransport`."""

    async def resume(self, payment: Payment) -> httpx.Response:
        """Carries the payment on."""


class SyncResumer(Protocol):
    """What resumes payments in plain code: `SyncPaymentTransport`."""

    def resume(self, payment: Payment) -> httpx.Response:
        """Carries the payment on."""


class PaymentHandle:
    """Resumes a payment whose outcome is unknown: the same bytes, so it is never charged twice."""

    def __init__(self, payment: Payment) -> None:
        self._payment = payment

    def __repr__(self) -> str:
        subject = self._payment.request.subject
        return f"PaymentHandle({subject.method} {subject.url})"

    async def resume(self, transport: AsyncResumer) -> httpx.Response:
        """Asks again and returns the answer, its body read; raises as the call itself would."""
        return await transport.resume(self._payment)

    def resume_sync(self, transport: SyncResumer) -> httpx.Response:
        """The same for plain code."""
        return transport.resume(self._payment)

"""A request that carries a payment: judged by the gate, admitted by the journal, then run.

The order is that of `docs/protocol.md`, Checks. Everything that can be refused is refused here, by
raising `Refused`, before the app is entered.
"""

from dataclasses import dataclass, replace
from functools import partial

from starlette.types import ASGIApp, Receive, Scope, Send

from x402mw.core import gate
from x402mw.core.gate import CallState, Claim, Outcome, Refused
from x402mw.core.sessions import Account
from x402mw.core.vouchers import BIND_BODY
from x402mw.provider import answers, request
from x402mw.provider.answers import ServedRoute
from x402mw.provider.journal import Admitted, JournalUnavailable
from x402mw.provider.meter import Payment
from x402mw.provider.request import Disconnected
from x402mw.provider.responder import PaidCall
from x402mw.provider.service import Service


@dataclass(slots=True)
class PaidVisit:
    """One request with a payment header on a priced route."""

    service: Service
    served: ServedRoute
    origin: str
    target: str
    scope: Scope
    receive: Receive
    send: Send

    async def run(self, app: ASGIApp) -> None:
        """Judges the payment and, if it is admitted, runs the app; else raises `Refused`.

        Raises `JournalUnavailable` too, and only before the app is entered.
        """
        service = self.service
        values = request.payment_headers(self.scope)
        await service.turns.take()
        claim = gate.inspect(values, service.book, service.link.open_token)
        await self._bind(claim)
        who = request.credentials(self.scope)
        since = service.events.now()
        admitted = await self._admit(claim, who)
        if isinstance(admitted, Outcome):
            await self._replay(claim, admitted)
            service.events.replayed(self.served)
        else:
            service.events.admitted(claim.session, first=admitted.first, since=since)
            await self._serve(app, claim, admitted, who)

    async def _bind(self, claim: Claim) -> None:
        """Reads the body, unless the voucher leaves it out, and checks the request hash."""
        body_hash = b""
        bytes_max = self.served.route.options.body_bytes_max
        request.check_length(self.scope, bytes_max)
        if claim.binding == BIND_BODY:
            body, body_hash = await request.read_body(self.scope, self.receive, bytes_max)
            self.receive = request.replay_body(body, self.receive)
        gate.bind(
            claim,
            method=self.scope["method"],
            origin=self.origin,
            target=self.target,
            body_hash=body_hash,
        )

    async def _admit(self, claim: Claim, who: bytes) -> Admitted | Outcome:
        service = self.service
        try:
            return await service.journal.admit(
                claim,
                offer=self.served.offer,
                book=service.book,
                standing=partial(service.standing, claim.session),
                credentials=who,
            )
        except Refused as refusal:
            # Settled, but its answer is on its way out this very moment: that is not "gone".
            if refusal.reason == "outcome_gone" and self._is_running(claim):
                raise await self._still_running(claim) from None
            raise

    async def _serve(self, app: ASGIApp, claim: Claim, admitted: Admitted, who: bytes) -> None:
        """Runs the app for an admitted call. Nothing may fail between admission and `run`."""
        session = answers.session_id(claim.session)
        payment = Payment(claim.terms, payer=claim.token.payer, session=session)
        call = PaidCall(
            self.service, self.served, claim, admitted, payment, who, self.scope, self.send
        )
        try:
            await call.run(app, self.receive)
        except (Refused, JournalUnavailable, Disconnected) as error:
            # The app's own, by whatever way it came there: here these words mean something else.
            raise RuntimeError("the app raised an error of the payment layer") from error

    async def _replay(self, claim: Claim, outcome: Outcome) -> None:
        """Gives an identical retry the stored answer, once the first one is wholly sent."""
        if self._is_running(claim):
            raise await self._still_running(claim)
        call = await self.service.journal.lookup(claim.session, claim.seq)
        account = await self.service.journal.account(claim.session)
        if call is None or account is None:
            raise gate.refused(claim, 410, "outcome_gone", "this answer is not kept any more")
        figures = answers.replay_figures(call, account, claim.token.payer)
        found = [
            *outcome.headers,
            (b"idempotent-replayed", b"true"),
            answers.payment_response(self.service.book, figures),
        ]
        body = b"" if self.scope["method"] == "HEAD" else outcome.body
        await self.send({"type": "http.response.start", "status": outcome.status, "headers": found})
        await self.send({"type": "http.response.body", "body": body})

    def _is_running(self, claim: Claim) -> bool:
        return (claim.session, claim.seq) in self.service.running

    async def _still_running(self, claim: Claim) -> Refused:
        refusal = gate.refused(claim, 409, "running", "this request is still being answered")
        refusal.retry_after = gate.RETRY_SECONDS
        call = await self.service.journal.lookup(claim.session, claim.seq)
        if call is not None:
            refusal.call = replace(call, state=CallState.OPEN)
            refusal.account = await self.service.journal.account(claim.session) or Account()
        return refusal

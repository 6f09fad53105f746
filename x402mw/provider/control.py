"""The control path: a buyer closes its session, or asks for a receipt.

A control request is an ordinary voucher of maximum 0, bound to its body, under terms that the
buyer builds from any offer. It writes no rows and keeps no outcomes: each repeat is judged anew.
Times and terms are not checked, so it works with an expired token and on a closed session
(`docs/protocol.md`, Control).
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Receive, Scope, Send

from x402mw.core import gate
from x402mw.core.amounts import parse_atomic
from x402mw.core.errors import AmountInvalid, Malformed
from x402mw.core.gate import CallState, Claim
from x402mw.core.messages import parse
from x402mw.core.sessions import Account
from x402mw.core.strict import dumps
from x402mw.core.tokens import Receipt, sign_receipt
from x402mw.provider import answers, request
from x402mw.provider.service import Service

CONTROL_BODY_BYTES_MAX = 4096
RUNNING_RETRY_SECONDS = 1
ESCROW_RETRY_SECONDS = 5
QUOTA_RETRY_SECONDS = 60


class ControlRequest(BaseModel):
    """The body of a control request. `seq` names one call, as a string of digits."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    op: Literal["close", "receipt"]
    seq: Annotated[str, Field(max_length=19)] | None = None


async def answer_control(
    service: Service, scope: Scope, receive: Receive, send: Send, *, origin: str, target: str
) -> None:
    """Answers a control request; refusals are raised as `Refused`."""
    claim, wanted = await _read(service, scope, receive, origin=origin, target=target)
    now = service.clock()
    if service.quota.exhausted(claim.session, now):
        refusal = gate.refused(claim, 429, "quota", "too many control calls; wait a minute")
        refusal.retry_after = QUOTA_RETRY_SECONDS
        raise refusal
    service.quota.spend(claim.session, now)
    if wanted.op == "close":
        status, retry_after = await _close(service, claim)
    else:
        await service.journal.check_session(claim)
        status, retry_after = 200, 0
    content = await _content(service, claim, wanted, final=wanted.op == "close" and status == 200)
    found = [answers.NO_STORE]
    if retry_after:
        found.append((b"retry-after", str(retry_after).encode()))
    await answers.send_answer(scope, send, status, found, dumps(content), b"application/json")


async def _read(
    service: Service, scope: Scope, receive: Receive, *, origin: str, target: str
) -> tuple[Claim, ControlRequest]:
    values = request.payment_headers(scope)
    claim = gate.inspect(values, service.book, service.link.open_token, control=True)
    request.check_length(scope, CONTROL_BODY_BYTES_MAX)
    body, body_hash = await request.read_body(scope, receive, CONTROL_BODY_BYTES_MAX)
    gate.bind(
        claim,
        method=scope["method"],
        origin=origin,
        target=target,
        body_hash=body_hash,
    )
    try:
        wanted = parse(ControlRequest, body)
        if wanted.seq is not None:
            parse_atomic(wanted.seq)
    except (Malformed, AmountInvalid) as error:
        raise gate.refused(claim, 400, "malformed", f"control body: {error}") from None
    return claim, wanted


async def _close(service: Service, claim: Claim) -> tuple[int, int]:
    """Takes a close as far as it goes now; returns the status and when to ask again."""
    view = await service.journal.begin_close(claim)
    if not view.ended:
        service.events.closing(claim.session)
    if view.open_calls:
        return 202, RUNNING_RETRY_SECONDS
    if not view.ended and not await service.redeemer.redeem_session(claim.session, final=True):
        return 202, ESCROW_RETRY_SECONDS
    return 200, 0


async def _content(
    service: Service, claim: Claim, wanted: ControlRequest, *, final: bool
) -> dict[str, Any]:
    account = await service.journal.account(claim.session) or Account()
    receipt = Receipt(
        network=service.book.network,
        session=claim.session,
        pay_to=service.book.pay_to,
        journal=service.book.journal,
        charged=account.charged,
        open=account.reserved,
        issued_at=int(service.clock()),
        final=final,
    )
    content: dict[str, Any] = {
        "charged": str(account.charged),
        "open": str(account.reserved),
        "receipt": sign_receipt(receipt, service.journal.receipt_seed),
    }
    if wanted.seq is not None:
        content["seq"] = await _call(service, claim.session, int(wanted.seq))
    return content


async def _call(service: Service, session: bytes, seq: int) -> dict[str, Any]:
    """What became of one call: a seq never admitted is "refused" with nothing charged."""
    call = await service.journal.lookup(session, seq)
    if call is None:
        return {"state": "refused", "charge": "0", "final": False}
    return {
        "state": answers.STATES[call.state],
        "charge": str(call.charge),
        "final": call.state is CallState.SETTLED,
    }

"""What may happen to calls and sessions: the journal's operations behind the middleware.

    admit --> open ---start--> started (mark, mark ...)
                |                 |
                +-----settle------+--> settled

Each takes a transaction and judges by the rows it reads there, never by memory alone.
"""

from dataclasses import dataclass
from typing import Any

from x402mw.core import gate, pricing, sessions
from x402mw.core.amounts import ZERO, Atomic
from x402mw.core.gate import CallState
from x402mw.core.sessions import Account, SessionEvent, SessionState
from x402mw.core.terms import Terms
from x402mw.provider.journal import retention, rows
from x402mw.provider.journal.rows import CallRow, Meter, SessionRow
from x402mw.provider.journal.transaction import Transaction

KEEP_SECONDS = 600
"""How long past the last moment its voucher could be admitted a call is remembered."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """A call that is reserved; it ends with `settle`, whatever happens. `amount` is atomic.

    `first` tells that it is the first one of its session.
    """

    session: bytes
    seq: int
    commitment: bytes
    terms: Terms
    amount: Atomic
    first: bool = False


@dataclass(frozen=True, slots=True)
class Settled:
    """What a call cost, and the session's totals after it. `used` is the quantity billed."""

    charge: Atomic
    charged_total: Atomic
    open_total: Atomic
    used: int


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session as control answers tell it."""

    charged: Atomic
    reserved: Atomic
    open_calls: int
    state: SessionState
    ended: bool


def admit(
    transaction: Transaction,
    claim: gate.Claim,
    *,
    offer: gate.Offer,
    book: gate.Book,
    standing: gate.Standing,
    credentials: bytes,
) -> Admitted | gate.Outcome:
    """Judges a bound claim (steps 9 to 12) and reserves its amount, or raises `gate.Refused`."""
    row = transaction.session(claim.session)
    call = lookup(transaction, claim.session, claim.seq)
    if call is None:
        _check_forgotten(transaction, claim)
        check_session(transaction, claim)
    verdict = gate.decide(
        claim,
        offer=offer,
        book=book,
        standing=standing,
        call=call,
        account=row.account if row else None,
        best=row.voucher if row else None,
        credentials=credentials,
        now=transaction.now,
    )
    if isinstance(verdict, gate.Outcome):
        return verdict
    _reserve(transaction, claim, row or first_seen(claim), verdict)
    terms, first = claim.terms, row is None
    return Admitted(claim.session, claim.seq, claim.commitment, terms, terms.amount, first=first)


def _check_forgotten(transaction: Transaction, claim: gate.Claim) -> None:
    """Refuses a voucher whose row may have been pruned, also if the clock has gone back since.

    Not with 402: its buyer would sign anew, and what was executed would run a second time.
    """
    if forget_at(claim) <= max(transaction.now, transaction.totals.forgotten_until):
        raise _forgotten(transaction, claim, "what became of this voucher is forgotten")


def check_session(transaction: Transaction, claim: gate.Claim) -> None:
    """Refuses a session that was used here and is forgotten: nothing true can be said of it."""
    if transaction.session(claim.session) is None and retention.may_be_forgotten(
        transaction, claim.token.claim_until
    ):
        raise _forgotten(transaction, claim, "what this session came to is forgotten")


def _forgotten(transaction: Transaction, claim: gate.Claim, detail: str) -> gate.Refused:
    refusal = gate.refused(claim, 410, "forgotten", detail)
    refusal.more = {"serverTime": int(transaction.now)}
    return refusal


def forget_at(claim: gate.Claim) -> int:
    """When the call of this claim may be forgotten, in seconds."""
    return (claim.expires + gate.VOUCHER_LATE_MS) // 1000 + KEEP_SECONDS


def first_seen(claim: gate.Claim) -> SessionRow:
    """The row of a session that was never used here: nothing charged, no voucher."""
    return SessionRow(
        id=claim.session,
        journal=claim.token.journal,
        account=Account(deposit=claim.token.deposit),
        voucher=None,
        claim_until=claim.token.claim_until,
    )


def _reserve(
    transaction: Transaction, claim: gate.Claim, row: SessionRow, account: Account
) -> None:
    best = account.best > row.account.best
    voucher = claim.signed.raw + claim.signed.signature if best else row.voucher
    transaction.put_session(seen(row, claim, account=account, voucher=voucher))
    transaction.put_call(
        CallRow(
            id=transaction.new_call(),
            session=claim.session,
            seq=claim.seq,
            commitment=claim.commitment,
            terms=claim.terms.id,
            amount=claim.terms.amount,
            state=CallState.OPEN,
            forget_at=forget_at(claim),
            worker=transaction.worker,
        )
    )


def seen(row: SessionRow, claim: gate.Claim, **changes: Any) -> SessionRow:
    """Takes from a token what only ever grows, and makes other `changes`."""
    return row._replace(
        claim_until=max(row.claim_until, claim.token.claim_until),
        released=max(row.released, claim.token.released),
        **changes,
    )


def lookup(transaction: Transaction, session: bytes, seq: int) -> gate.Call | None:
    """Returns the call of (session, seq), with its stored outcome if that is still kept."""
    row = transaction.call(session, seq)
    if row is None:
        return None
    settled = row.state is CallState.SETTLED
    return row.as_call(transaction.outcome(row) if settled else None)


def start(transaction: Transaction, call: Admitted, mark: Atomic) -> None:
    """Notes that the answer has begun: from now on a crash charges at least `mark`."""
    row = _unsettled(transaction, call)
    if row is not None:
        mark = min(max(row.mark, mark), row.amount)
        transaction.put_call(row._replace(state=CallState.STARTED, mark=mark))


def mark(transaction: Transaction, call: Admitted, used: int) -> None:
    """Notes what a started call has used so far: a crash charges that, beside the start's mark."""
    row = _unsettled(transaction, call)
    if row is None or not call.terms.metered:
        return
    units, _ = pricing.rate_call(call.terms, 0, used)
    if units > row.mark_units:
        meter = _meter(transaction, call)
        transaction.put_meter(call.session, call.terms.id, meter)
        transaction.put_call(row._replace(mark_units=units))


def settle(
    transaction: Transaction,
    call: Admitted,
    *,
    used: int | None,
    outcome: gate.Outcome | None,
) -> Settled:
    """Charges a call for what it used, or voids it (`used` None), once: repeats change nothing."""
    row = _unsettled(transaction, call)
    if row is not None:
        units, charge = (0, ZERO) if used is None else _rate(transaction, call, used)
        close_call(transaction, row, charge=charge, used=units)
        if outcome is not None:
            transaction.put_outcome(row, outcome)
    return _settled(transaction, call)


def _rate(transaction: Transaction, call: Admitted, used: int) -> tuple[int, Atomic]:
    if not call.terms.metered:
        return pricing.rate_call(call.terms, 0, used)
    meter = _meter(transaction, call)
    units, charge = pricing.rate_call(call.terms, meter.quantity, used)
    meter = meter._replace(quantity=meter.quantity + units)
    transaction.put_meter(call.session, call.terms.id, meter)
    return units, charge


def _meter(transaction: Transaction, call: Admitted) -> Meter:
    known = transaction.meter(call.session, call.terms.id)
    return known or Meter(call.terms.unit_price, call.terms.per)


def close_call(transaction: Transaction, row: CallRow, *, charge: Atomic, used: int) -> None:
    """Turns one call's reservation into a charge."""
    session = transaction.session(row.session)
    if session is None:
        raise LookupError("a call belongs to a session")
    account = sessions.settle(session.account, reserved=row.amount, charge=charge)
    transaction.put_session(session._replace(account=account))
    transaction.put_call(row._replace(state=CallState.SETTLED, charge=charge, used=used))


def _unsettled(transaction: Transaction, call: Admitted) -> CallRow | None:
    row = transaction.call(call.session, call.seq)
    if row is None:
        raise LookupError("this call was never admitted, or is forgotten")
    return None if row.state is CallState.SETTLED else row


def _settled(transaction: Transaction, call: Admitted) -> Settled:
    row, session = transaction.call(call.session, call.seq), transaction.session(call.session)
    if row is None or session is None:
        raise LookupError("this call was never admitted, or is forgotten")
    account = session.account
    return Settled(row.charge, account.charged, account.reserved, row.used)


def begin_close(transaction: Transaction, claim: gate.Claim) -> SessionView:
    """Lets a session admit nothing more, also one that was never used here."""
    check_session(transaction, claim)
    row = transaction.session(claim.session) or first_seen(claim)
    account = sessions.move(row.account, SessionEvent.CLOSE)
    transaction.put_session(seen(row, claim, account=account))
    return view(transaction, claim.session)


def view(transaction: Transaction, session: bytes) -> SessionView:
    """Tells where a session stands."""
    row = transaction.session(session)
    if row is None:
        raise LookupError("this session is not known here")
    ((open_calls,),) = transaction.select(rows.COUNT_UNSETTLED, (session,))
    account = row.account
    return SessionView(account.charged, account.reserved, open_calls, account.state, row.ended)


def recover(transaction: Transaction, worker: int) -> int:
    """Settles what a dead worker left: nothing sent is void, a started call costs its marks.

    Returns the number of calls settled.
    """
    found = transaction.select(rows.READ_UNSETTLED, (worker,))
    for row in map(rows.read_call, found):
        charge, used = _marked(transaction, row)
        close_call(transaction, row, charge=charge, used=used)
    return len(found)


def _marked(transaction: Transaction, row: CallRow) -> tuple[Atomic, int]:
    meter = transaction.meter(row.session, row.terms)
    if row.state is CallState.OPEN or meter is None:
        return (ZERO if row.state is CallState.OPEN else row.mark), 0
    before, units = meter.quantity, row.mark_units
    grown = pricing.rate(meter.unit_price, meter.per, before + units) - pricing.rate(
        meter.unit_price, meter.per, before
    )
    transaction.put_meter(row.session, row.terms, meter._replace(quantity=before + units))
    return min(row.amount, Atomic(row.mark + grown)), units

"""The journal's side of redeeming: what is due, what was sent, and what became of it.

1. `sent` is written before anything is sent. A `redeemed` above it can only mean that this journal
   forgot: it is a restored backup.
2. What the escrow reports only ever raises `redeemed` and `released`.
3. What the escrow refuses for good is written off; it is shown and no longer counted.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from x402mw.core.amounts import ZERO, Atomic
from x402mw.core.sessions import SessionEvent, SessionState, move
from x402mw.provider.journal import rows
from x402mw.provider.journal.retention import may_be_forgotten
from x402mw.provider.journal.rows import SessionRow
from x402mw.provider.journal.transaction import Transaction

REST_SECONDS = 60
"""How long an item that the escrow refused, but not for good, is left alone."""

REFUSED_FOR_GOOD = frozenset(
    {"malformed", "wrong_network", "unknown_session", "signature", "invalid_state"}
)
"""Codes of the escrow for items that no later attempt could redeem (`docs/escrow.md`)."""


@dataclass(frozen=True, slots=True)
class Due:
    """Which sessions to redeem: owing at least `amount`, or for `age_seconds`, or running out.

    A session runs out `margin_seconds` before the last moment its vouchers are taken.
    """

    amount: Atomic
    age_seconds: float
    margin_seconds: float


@dataclass(frozen=True, slots=True)
class Item:
    """One session to redeem. Without a `voucher` nothing was ever charged.

    `redeemed` is what the escrow had accepted before.
    """

    session: bytes
    journal: bytes
    voucher: bytes | None
    amount: Atomic
    final: bool
    redeemed: Atomic = ZERO


@dataclass(frozen=True, slots=True)
class Report:
    """What the escrow says about a session, in a verdict or in its list of changes."""

    session: bytes
    redeemed: Atomic
    released: Atomic
    ended: bool
    claim_until: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """The escrow's refusal of one item."""

    session: bytes
    code: str


def due(transaction: Transaction, rule: Due, limit: int) -> list[Item]:
    """Returns up to `limit` items, all noted as sent: sessions to close first, then by urgency."""
    now = int(transaction.now)
    closing = transaction.select(rows.CLOSING_SESSIONS, (now, limit))
    owed = transaction.select(
        rows.OWED_SESSIONS,
        {
            "now": now,
            "owed_before": int(now - rule.age_seconds),
            "claim_before": int(now + rule.margin_seconds),
            "amount": rule.amount,
            "limit": limit,
        },
    )
    # A closing session is owed too, often; it needs only its final item.
    found = {row.id: row for row in map(rows.read_session, [*closing, *owed])}
    return [_send(transaction, row) for row in list(found.values())[:limit]]


def owed_since(transaction: Transaction) -> int | None:
    """Returns since when (seconds) the oldest money has been owed; None if nothing is."""
    ((oldest,),) = transaction.select(rows.OLDEST_OWED)
    return None if oldest is None else int(oldest)


def one(transaction: Transaction, session: bytes, *, final: bool) -> Item | None:
    """Returns the item of one session, noted as sent; None if there is nothing to send.

    A final item waits until the session is closing and no call is open.
    """
    row = transaction.session(session)
    if row is None or row.ended or row.written_off:
        return None
    if not (_may_close(row) if final else row.owed):
        return None
    return _send(transaction, row)


def _may_close(row: SessionRow) -> bool:
    return row.account.state is SessionState.CLOSING and row.account.reserved == 0


def _send(transaction: Transaction, row: SessionRow) -> Item:
    charged = row.account.charged
    if charged > row.sent:
        transaction.put_session(row._replace(sent=charged))
    final = _may_close(row)
    return Item(row.id, row.journal, row.voucher, charged, final=final, redeemed=row.redeemed)


def apply_reports(transaction: Transaction, reports: Iterable[Report], journal: bytes) -> bool:
    """Takes over what the escrow says; tells whether it proves `journal` a restored backup."""
    restored = False
    for report in reports:
        row = transaction.session(report.session)
        sent = row.sent if row else ZERO
        ours = row.journal == journal if row else not _is_forgotten(transaction, report)
        restored |= ours and report.redeemed > sent
        if row is not None:
            transaction.put_session(_reported(row, report))
    return restored


def _is_forgotten(transaction: Transaction, report: Report) -> bool:
    return report.ended and may_be_forgotten(transaction, report.claim_until)


def _reported(row: SessionRow, report: Report) -> SessionRow:
    before = row.paid
    row = row._replace(
        redeemed=max(row.redeemed, report.redeemed),
        released=max(row.released, report.released),
        claim_until=max(row.claim_until, report.claim_until),
    )
    if row.paid > before:
        # What is still owed was earned later; its age counts from now.
        row = row._replace(owed_since=None)
    if row.account.charged <= row.paid:
        row = row._replace(written_off=None)
    elif report.ended:
        # What is still owed by a session that ended can never be had.
        row = row._replace(written_off=row.written_off or "ended")
    if report.ended:
        row = row._replace(account=move(row.account, SessionEvent.CLOSED), ended=True)
    return row


def apply_refusals(transaction: Transaction, refusals: Iterable[Refusal]) -> None:
    """Writes off what was refused for good, and lets the rest wait."""
    for refusal in refusals:
        row = transaction.session(refusal.session)
        if row is None:
            continue
        if refusal.code in REFUSED_FOR_GOOD:
            account = move(row.account, SessionEvent.CLOSED)
            row = row._replace(account=account, written_off=refusal.code)
        else:
            row = row._replace(retry_at=int(transaction.now) + REST_SECONDS)
        transaction.put_session(row)


def replace_identity(transaction: Transaction, journal: bytes, receipt_seed: bytes) -> None:
    """Gives the book a new id and receipt key; sessions of the old one admit nothing more."""
    transaction.write(rows.REPLACE_JOURNAL)
    transaction.write(rows.ADD_JOURNAL, (journal, receipt_seed))
    transaction.tell_workers()

"""What the journal forgets, and when: calls after their voucher's time, ended sessions later.

A forgotten call can never be admitted again: its voucher has long expired, and should the clock
have gone back, `forgotten_until` still refuses it. A forgotten session is not begun anew either,
and that the escrow knows more of it than we do proves nothing.
"""

from collections.abc import Iterable

from x402mw.core.gate import TERMS_GRACE_SECONDS
from x402mw.provider.journal import rows
from x402mw.provider.journal.shared import SESSIONS_FORGOTTEN
from x402mw.provider.journal.transaction import Transaction

FORGET_AT_ONCE = 500
TERMS_MARGIN_SECONDS = 60
SESSION_KEEP_SECONDS = 24 * 3600


def forget(transaction: Transaction) -> bool:
    """Prunes some of what may go; tells whether more may be waiting.

    Runs before any operation of its transaction has read a row.
    """
    transaction.forget_known()
    now, totals = int(transaction.now), transaction.totals
    calls = transaction.select(rows.FORGETTABLE_CALLS, (now, FORGET_AT_ONCE))
    for name, forget_at in calls:
        transaction.write(rows.DROP_CALL, (name,))
        for (size,) in transaction.write(rows.DROP_OUTCOME, (name,)):
            totals.outcome_bytes -= size
        totals.forgotten_until = max(totals.forgotten_until, forget_at)
    limits = (now - SESSION_KEEP_SECONDS, FORGET_AT_ONCE)
    ended = transaction.select(rows.FORGETTABLE_SESSIONS, limits)
    for session, _ in ended:
        transaction.write(rows.DROP_SESSION, (session,))
        transaction.write(rows.DROP_METERS, (session,))
    newest = max((claim_until for _, claim_until in ended), default=0)
    if newest > transaction.shared.sessions_forgotten_until:
        transaction.write_setting(SESSIONS_FORGOTTEN, str(newest))
    return FORGET_AT_ONCE in (len(calls), len(ended))


def may_be_forgotten(transaction: Transaction, claim_until: int) -> bool:
    """Whether a session without a row may have had one; `claim_until` is of its newest token.

    Also if the clock has gone back since.
    """
    known_since = transaction.now - SESSION_KEEP_SECONDS
    return claim_until <= max(known_since, transaction.shared.sessions_forgotten_until)


def keep_terms(transaction: Transaction, ids: Iterable[bytes]) -> dict[bytes, int]:
    """Makes `ids` the terms offered now, and returns the others still in grace, with since when."""
    now = int(transaction.now)
    transaction.write(rows.RETIRE_TERMS, (now,))
    for terms in ids:
        transaction.write(rows.KEEP_TERMS, (terms,))
    transaction.write(rows.DROP_TERMS, (now - TERMS_GRACE_SECONDS - TERMS_MARGIN_SECONDS,))
    return dict(transaction.select(rows.READ_RETIRED_TERMS))

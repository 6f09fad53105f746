"""Our account of a session beside the provider's: what its totals tell, and when they differ."""

from x402mw.core.amounts import ZERO, Atomic
from x402mw.core.errors import AccountsDiffer, Malformed
from x402mw.core.keys import public_key
from x402mw.core.vouchers import parse_voucher, verify_voucher
from x402mw_client.answers import Word
from x402mw_client.sessions import Session


def differs(session: Session) -> bool:
    """The largest-total rule: with nothing open, the provider's total must be our sum."""
    return session.held == 0 and session.total_seen != session.charged


def note_totals(session: Session, word: Word) -> None:
    """Takes in the totals of a settled answer."""
    session.total_seen = max(session.total_seen, word.charged_total or session.charged)
    nothing_else = session.held == session.unattributed
    if session.unattributed and nothing_else and word.open_total == 0:
        # What we had forgotten is settled now: its charge is what our own sum lacks.
        lacking = min(max(0, session.total_seen - session.charged), session.unattributed)
        session.charged = Atomic(session.charged + lacking)
        session.held = session.unattributed = ZERO


def proves_loss(session: Session, word: Word) -> bool:
    """Whether a corrective 402 shows a voucher of ours that we do not remember, and fits it."""
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


def accounts_differ(session: Session) -> AccountsDiffer:
    """The error of everything that would be signed in a session whose accounts differ."""
    return AccountsDiffer(
        f"the provider's account of {session.name} is not ours: nothing more is signed in it"
    )

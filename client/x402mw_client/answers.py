"""The buyer's table: what an answer to a signed request means (`docs/protocol.md`, Buyer).

Only `PAYMENT-RESPONSE` with our own seq is the provider's word. An answer without it decides
nothing, and may be re-sent only where that can do no harm.
"""

import re
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Final, NamedTuple

import httpx

from x402mw.core import headers
from x402mw.core.amounts import ZERO, Atomic, parse_atomic
from x402mw.core.errors import AmountInvalid, Malformed
from x402mw.core.messages import SettlementResponse, parse
from x402mw.core.strict import b64_decode, loads_object

SHORT_BYTES = 16 * 1024
REASON_PREFIX = "invalid_batch_settlement_escrow_"
RETRY_AFTER_MAX_SECONDS = 60.0


class Verdict(Enum):
    """What follows from an answer."""

    SETTLED = "the charge is final; the answer goes to the caller"
    OPEN = "the answer has begun; the charge is asked for later"
    RUNNING = "the call runs: wait, then send the same bytes"
    LATER = "refused for now: wait, then send the same bytes"
    LOST = "nobody knows: send the same bytes, a few times"
    SIGN_AGAIN = "refused: follow the fresh terms, with the same seq"
    REJECTED = "refused for good: the answer goes to the caller"
    OTHER_FORM = "another voucher was admitted for this seq"
    GONE = "settled, but the answer is not kept or not for us"
    FORGOTTEN = "too late: the provider no longer knows whether the call ran"
    REPLACED = "another journal answers for this provider now"
    FOREIGN = "not our provider's word: to the caller, and never sent again"


class Word(NamedTuple):
    """The provider's account of our call, out of `PAYMENT-RESPONSE`."""

    state: str
    reason: str
    final: bool
    charge: Atomic
    commitment: str
    charged_total: Atomic | None = None
    open_total: Atomic | None = None
    voucher: str | None = None


@dataclass(frozen=True, slots=True)
class _Row:
    verdict: Verdict
    state: str | None = None
    reason: str | None = None
    statuses: tuple[int, ...] = ()

    def fits(self, status: int, state: str, reason: str) -> bool:
        return (
            (self.state is None or self.state == state)
            and (self.reason is None or self.reason == reason)
            and (not self.statuses or status in self.statuses)
        )


_NOT_AGAIN: Final = (409, 410)
# The first row that fits decides. A reason counts only beside its status, or with a refusal.
_WITH_WORD: Final = (
    _Row(Verdict.RUNNING, reason="running", statuses=_NOT_AGAIN),
    _Row(Verdict.OTHER_FORM, reason="seq_used", statuses=_NOT_AGAIN),
    _Row(Verdict.GONE, reason="outcome_gone", statuses=_NOT_AGAIN),
    _Row(Verdict.GONE, reason="credentials", statuses=_NOT_AGAIN),
    _Row(Verdict.FORGOTTEN, reason="forgotten", statuses=_NOT_AGAIN),
    _Row(Verdict.REPLACED, reason="journal_replaced", statuses=_NOT_AGAIN),
    _Row(Verdict.RUNNING, state="running"),
    _Row(Verdict.OPEN, state="open"),
    _Row(Verdict.SETTLED, state="settled"),
    _Row(Verdict.LATER, state="refused", statuses=(429, 503)),
    _Row(Verdict.SIGN_AGAIN, state="refused", statuses=(402,)),
    _Row(Verdict.REJECTED, state="refused"),
)
LOST_STATUSES: Final = (402, 502, 503, 504)


def classify(answer: httpx.Response | None, word: Word | None) -> Verdict:
    """Reads the table; no answer at all is as lost as one that a proxy made up."""
    if answer is None:
        return Verdict.LOST
    if word is None:
        return Verdict.LOST if answer.status_code in LOST_STATUSES else Verdict.FOREIGN
    return _judge(answer.status_code, word.state, word.reason)


@lru_cache(maxsize=256)
def _judge(status: int, state: str, reason: str) -> Verdict:
    return next(row.verdict for row in _WITH_WORD if row.fits(status, state, reason))


def read_word(answer: httpx.Response | None, seq: int) -> Word | None:
    """The provider's word on the call `seq`; None if there is none, or it is garbage."""
    value = None if answer is None else answer.headers.get(headers.PAYMENT_RESPONSE)
    if value is None or len(value) > headers.RESPONSE_BYTES_MAX:
        return None
    try:
        raw = b64_decode(value.encode())
        usual = _USUAL.fullmatch(raw)
        found, word = _read_any(raw) if usual is None else _read_usual(*usual.groups())
    except (Malformed, AmountInvalid, UnicodeEncodeError):
        return None
    return word if found == str(seq) else None


# What ends most calls, as our providers write it. It is read here as `_read_any` reads it, which
# takes five times as long: no escapes, no key twice, and amounts of so few digits are in range.
_AMOUNT = '"(0|[1-9][0-9]{0,17})"'
_USUAL = re.compile(
    (
        r'\{"success":true,"transaction":"([0-9a-f]{64})","network":"[0-9A-Za-z:._-]{1,128}",'
        rf'"amount":{_AMOUNT},"extra":\{{"seq":"([0-9]{{1,19}})","state":"settled","final":true,'
        rf'"chargedTotal":{_AMOUNT},"openTotal":{_AMOUNT}\}},"payer":"[0-9a-z_]{{1,128}}"\}}'
    ).encode()
)


def _read_usual(
    commitment: bytes, charge: bytes, seq: bytes, charged: bytes, opened: bytes
) -> tuple[str, Word]:
    word = Word(
        state="settled",
        reason="",
        final=True,
        charge=Atomic(int(charge)),
        commitment=commitment.decode(),
        charged_total=Atomic(int(charged)),
        open_total=Atomic(int(opened)),
    )
    return seq.decode(), word


def _read_any(raw: bytes) -> tuple[str | None, Word | None]:
    said = parse(SettlementResponse, raw)
    extra = said.extra
    if extra is None:
        return None, None
    word = Word(
        state=extra.state,
        reason=(said.error_reason or "").removeprefix(REASON_PREFIX),
        final=extra.final,
        charge=ZERO if said.amount is None else parse_atomic(said.amount),
        commitment=said.transaction,
        charged_total=_total(extra.charged_total),
        open_total=_total(extra.open_total),
        voucher=extra.voucher,
    )
    return extra.seq, word


def _total(text: str | None) -> Atomic | None:
    return None if text is None else parse_atomic(text)


def is_short(answer: httpx.Response) -> bool:
    """Whether a paid answer is one that the provider keeps for retries: short, of known length."""
    length = answer.headers.get("Content-Length", "")
    known = headers.PAYMENT_RESPONSE in answer.headers and length.isdecimal()
    return known and int(length) <= SHORT_BYTES


def retry_after(answer: httpx.Response | None, otherwise: float) -> float:
    """The seconds that an answer asks us to wait, within reason."""
    text = "" if answer is None else answer.headers.get("Retry-After", "")
    return min(float(text), RETRY_AFTER_MAX_SECONDS) if text.isdecimal() else otherwise


def may_be_not_priced(answer: httpx.Response) -> bool:
    """Whether the answer may say `not_priced`: short problem details, so worth reading."""
    length = answer.headers.get("Content-Length", "")
    return (
        answer.status_code == httpx.codes.CONFLICT
        and answer.headers.get("Content-Type") == "application/problem+json"
        # Either of these could make it longer than it says.
        and not {"transfer-encoding", "content-encoding"}.intersection(answer.headers)
        and length.isdecimal()
        and len(length) <= len(str(headers.SIGNATURE_BYTES_MAX))
        and int(length) <= headers.SIGNATURE_BYTES_MAX
    )


def says_not_priced(answer: httpx.Response) -> bool:
    """Whether a problem document, now read, tells us to send the request without payment."""
    try:
        return loads_object(answer.content).get("code") == "not_priced"
    except Malformed:
        return False

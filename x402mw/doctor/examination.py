"""The examination of one URL: what is asked, in which order, and what the answers mean.

    unpaid -> terms -> the same again for HEAD and a browser -> an invalid payment, short and long
           -> the control path -> the escrow that the terms name

The payment is signed by a key of the moment and carries no token, so it can never count; where it
comes through, the provider refuses it with its own words and a PAYMENT-RESPONSE.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import httpx

from x402mw.core import headers
from x402mw.core.amounts import USDC, ZERO, display
from x402mw.core.errors import AmountInvalid, InsecureOrigin, Malformed
from x402mw.core.keys import secret_key
from x402mw.core.messages import SettlementResponse
from x402mw.core.strict import b64_encode, dumps
from x402mw.core.vouchers import Voucher, sign_voucher
from x402mw.doctor.asking import Answer, Asker, Unreachable
from x402mw.doctor.escrow import check_escrow
from x402mw.doctor.findings import Finding, Severity, finding
from x402mw.doctor.terms import Offered, check_place, origin_of, read_offer, read_required
from x402mw_client.secure import check_secure

WRONG_SECONDS, OFF_SECONDS = 120, 30
EXPIRES_MS = 300_000
SIGNATURE_RAW_MAX = headers.SIGNATURE_BYTES_MAX // 4 * 3
_NOT_OURS = frozenset({"not_402", "not_ours"})


class Verdict(Enum):
    """How the examination ended, and the exit status that says so."""

    FINE = "fine"
    PROBLEMS = "problems"
    NOT_OURS = "not_ours"
    UNREACHABLE = "unreachable"

    @property
    def status(self) -> int:
        """0 fine, 1 problems, 2 nothing of ours to examine."""
        return {"fine": 0, "problems": 1}.get(self.value, 2)


@dataclass(slots=True)
class Diagnosis:
    """What was found at a URL. `facts` are what the terms say; `cause` why there was no answer."""

    url: str
    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    cause: str = ""

    @property
    def verdict(self) -> Verdict:
        """The worst of it in a word."""
        if self.cause:
            return Verdict.UNREACHABLE
        if _NOT_OURS & {one.code for one in self.findings}:
            return Verdict.NOT_OURS
        bad = any(one.severity is Severity.PROBLEM for one in self.findings)
        return Verdict.PROBLEMS if bad else Verdict.FINE

    def as_json(self) -> dict[str, Any]:
        """The diagnosis as plain values."""
        return {
            "url": self.url,
            "verdict": self.verdict.value,
            "cause": self.cause,
            "facts": self.facts,
            "findings": [one.as_json() for one in self.findings],
        }


async def examine(
    url: str,
    http: httpx.AsyncClient,
    clock: Callable[[], float],
    *,
    method: str = "GET",
    escrow_root: str | None = None,
) -> Diagnosis:
    """Examines a provider's URL; `escrow_root` is the root key that its escrow should have."""
    examination = _Examination(url, method, Asker(http, clock), clock)
    try:
        await examination.run(escrow_root)
    except Unreachable as error:
        examination.diagnosis.cause = str(error)
    return examination.diagnosis


class _Examination:
    def __init__(self, url: str, method: str, asker: Asker, clock: Callable[[], float]) -> None:
        self.url, self.method = httpx.URL(url), method
        self.asker, self.clock = asker, clock
        self.diagnosis = Diagnosis(url)

    def find(self, code: str, seen: str) -> None:
        if all(one.code != code for one in self.diagnosis.findings):
            self.diagnosis.findings.append(finding(code, seen))

    async def run(self, escrow_root: str | None) -> None:
        try:
            check_secure(self.url)
        except InsecureOrigin:
            self.find("insecure", f"{self.url.scheme}://{self.url.host}")
        answer = await self.asker.ask(self.method, str(self.url))
        offered = self._read(answer)
        if offered is None:
            return
        self._check_answer(answer)
        self.diagnosis.findings += check_place(offered, self.method, self.url)
        await self._ask_again(answer)
        await self._ask_paid(offered)
        await self._ask_control(offered)
        self.diagnosis.findings += await check_escrow(
            self.asker, self.url, offered, escrow_root, answer.ahead
        )

    # The unpaid answer.

    def _read(self, answer: Answer) -> Offered | None:
        if 300 <= answer.status < 400:
            target = origin_of(answer.headers.get("Location", ""))
            self.find("redirect", f"{answer.status}, from {origin_of(str(self.url))} to {target}")
            return None
        if answer.status != httpx.codes.PAYMENT_REQUIRED:
            code = answer.problem
            known = {"unknown_host": "unknown_host", "": "not_402"}.get(code, "refuses")
            self.find(known, f"{answer.status} {code} {answer.content.get('detail', '')}".strip())
            return None
        required, found = read_required(answer)
        self.diagnosis.findings += found
        if required is None:
            if not found:
                self.find("not_ours", "a 402 without terms of x402 V2")
            return None
        offered, found = read_offer(required)
        self.diagnosis.findings += found
        if offered is not None:
            self._note_facts(offered)
        return offered

    def _note_facts(self, offered: Offered) -> None:
        requirements, extra = offered.requirements, offered.extra
        try:
            price = f"at most {display(int(requirements.amount))} {USDC.code}"
        except (ValueError, AmountInvalid):
            price = requirements.amount
        self.diagnosis.facts = {
            "route": extra.route,
            "price": price,
            "payTo": requirements.pay_to,
            "network": requirements.network,
            "escrow": extra.escrow,
            "origin": origin_of(offered.url) if offered.url else "-",
        }

    def _check_answer(self, answer: Answer) -> None:
        """What can be seen of caches, compression, pages of errors and clocks."""
        control = answer.headers.get("Cache-Control", "")
        if "no-store" not in control.lower():
            self.find("cacheable", f"Cache-Control: {control or '(none)'}")
        if "Age" in answer.headers:
            self.find("cached", f"Age: {answer.headers['Age']}")
        coding = answer.headers.get("Content-Encoding")
        if coding:
            self.find("compressed", f"Content-Encoding: {coding}")
        if not answer.problem:
            kind = answer.headers.get("Content-Type", "(none)")
            self.find("problem_unreadable", f"402 with Content-Type: {kind}")
        ahead = answer.ahead
        if ahead is None:
            self.find("no_date", "no Date, or none that can be read")
        elif abs(ahead) > OFF_SECONDS:
            code = "clock_wrong" if abs(ahead) > WRONG_SECONDS else "clock_off"
            self.find(code, f"the answer's Date is {ahead:+.0f} s from this machine's clock")

    async def _ask_again(self, first: Answer) -> None:
        """HEAD must cost what GET costs; a browser must get a page, unless a cache answers."""
        if self.method != "GET":
            return
        head = await self.asker.ask("HEAD", str(self.url))
        terms = [one.headers.get(headers.PAYMENT_REQUIRED) for one in (first, head)]
        if head.status != first.status or terms[0] != terms[1]:
            self.find("head_not_priced", f"HEAD is answered {head.status}, GET {first.status}")
        page = await self.asker.ask("GET", str(self.url), Accept="text/html")
        if first.problem and page.body == first.body and "Age" not in first.headers:
            self.find("cached", "a browser is given the answer of another client")

    # A payment that cannot count.

    async def _ask_paid(self, offered: Offered) -> None:
        code, seen = await self._judge_payment(offered, long=False)
        if code:
            self.find(code, seen)
            return
        code, seen = await self._judge_payment(offered, long=True)
        if code:
            self.find("header_limit", f"a payment header of 4 KiB: {seen}")

    async def _judge_payment(self, offered: Offered, *, long: bool) -> tuple[str, str]:
        """Returns the code of a finding and what was seen; no code if all is well."""
        seq = secrets.randbits(63)
        value = _invalid_payment(offered, seq, int(self.clock() * 1000), long=long)
        try:
            answer = await self.asker.ask(self.method, str(self.url), PAYMENT_SIGNATURE=value)
        except Unreachable as error:
            return "signature_blocked", str(error)
        seen = f"{answer.status} {answer.problem}".strip()
        if _names(answer, seq):
            if not answer.problem and not long:
                self.find("problem_unreadable", f"{seen} to a payment that is not valid")
            return "", seen
        if answer.problem == "payment_required":
            return "signature_stripped", f"{seen}, as if there had been no payment"
        if answer.problem in ("malformed", "payment_header"):
            return "signature_altered", f"{seen}: {answer.content.get('detail', '')}"
        if answer.problem:
            return "response_stripped", f"{seen} without {headers.PAYMENT_RESPONSE}"
        return "signature_blocked", f"{seen}, and not by the provider"

    async def _ask_control(self, offered: Offered) -> None:
        """Without a payment the control path answers 400, in the provider's own words."""
        url = f"{origin_of(str(self.url))}{offered.extra.control}"
        try:
            answer = await self.asker.ask("POST", url, content=b"{}")
            reached, seen = answer.problem == "payment_header", str(answer.status)
        except Unreachable as error:
            reached, seen = False, str(error)
        if not reached:
            self.find("control_unreachable", f"POST {offered.extra.control}: {seen}")


def _invalid_payment(offered: Offered, seq: int, now_ms: int, *, long: bool) -> str:
    """A payment header in the right form, without a token and signed by nobody."""
    voucher = Voucher(bytes(32), bytes(16), seq, ZERO, bytes(32))
    accepted = offered.accepts
    content = {
        "x402Version": 2,
        "payload": {
            "voucher": sign_voucher(voucher, secret_key(secrets.token_bytes(32))).wire,
            "token": "x402mw-doctor",
            "expires": now_ms + EXPIRES_MS,
            "binding": 0,
        },
        "accepted": accepted,
    }
    if long:
        # More keys may stand beside ours in `extra`.
        spare = SIGNATURE_RAW_MAX - len(dumps(content)) - len(',"doctor":""')
        extra = {**accepted["extra"], "doctor": "x" * max(0, spare)}
        content["accepted"] = {**accepted, "extra": extra}
    return b64_encode(dumps(content))


def _names(answer: Answer, seq: int) -> bool:
    """Whether an answer's PAYMENT-RESPONSE is about this very payment."""
    value = answer.headers.get(headers.PAYMENT_RESPONSE, "")
    try:
        word = headers.decode_header(SettlementResponse, value.encode(), headers.RESPONSE_BYTES_MAX)
    except (Malformed, UnicodeEncodeError):
        return False
    return word.extra is not None and word.extra.seq == str(seq)

"""What really happened, as the world saw it: independent of anything our code says about itself.

The oracle counts handler runs itself, reads every signed voucher off the wire, and later compares
that with the books. It knows the voucher's layout from `docs/protocol.md`, not from our parser.
"""

import base64
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Run:
    """One run of a handler: what it did, and thus what it may cost."""

    call: str
    provider: str
    life: int
    session: str
    seq: int
    route: str
    amount: int
    at: float
    used: int = 0
    status: int = 0
    begun: bool = False
    ended: bool = False
    failed: bool = False
    disturbed: bool = False


@dataclass
class Asked:
    """One call of a buyer's program, and what it was told."""

    call: str
    buyer: str
    provider: str
    route: str
    answers: list[str] = field(default_factory=list)


@dataclass
class Signed:
    """All vouchers of one session that ever left a buyer."""

    most: int = 0
    by: str = ""
    forms: dict[int, set[bytes]] = field(default_factory=lambda: defaultdict(set))


class Oracle:
    """The record of one seed."""

    def __init__(self) -> None:
        self.note: Callable[..., None] = lambda *_: None
        self.runs: list[Run] = []
        self.by_call: dict[str, list[Run]] = defaultdict(list)
        self.asked: dict[str, Asked] = {}
        self.signed: dict[str, Signed] = defaultdict(Signed)
        self.locks: dict[str, set[str]] = defaultdict(set)
        self.by_hand: dict[str, int] = defaultdict(int)
        self.problems: list[str] = []
        self.counts: Counter[str] = Counter()
        self.most_seen: dict[tuple[str, str], int] = {}

    def fail(self, problem: str) -> None:
        """A rule was broken."""
        self.problems.append(problem)

    def count(self, what: str, more: int = 1) -> None:
        """Something worth knowing of happened."""
        self.counts[what] += more

    def begin(self, run: Run) -> Run:
        """A handler starts to run."""
        self.note("run", run.provider, run.call, f"seq {run.seq}", run.session)
        self.runs.append(run)
        self.by_call[run.call].append(run)
        return run

    def tap(self, here: str, request: httpx.Request) -> None:
        """Reads the voucher of a request that leaves a party."""
        header = request.headers.get("PAYMENT-SIGNATURE")
        if header is None:
            return
        try:
            content: Any = json.loads(base64.b64decode(header))
            text = content["payload"]["voucher"]
            raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        except (ValueError, KeyError, TypeError):
            return
        if len(raw) != 176:
            return
        session = "esc_" + raw[48:64].hex()
        seq = int.from_bytes(raw[64:72], "big")
        signed = self.signed[session]
        signed.by = signed.by or here
        if signed.by == here:
            signed.most = max(signed.most, int.from_bytes(raw[72:80], "big"))
            signed.forms[seq].add(raw[:112])

    def tap_escrow(self, _here: str, request: httpx.Request) -> None:
        """Notes what buyers ask to lock: each idempotency key once, however often it is sent."""
        key, path = request.headers.get("Idempotency-Key"), request.url.path
        if key is None or not path.endswith(("/escrow", "/topup")):
            return
        session = path.split("/")[-2] if path.endswith("/topup") else ""
        self.locks[session or request.headers["Authorization"]].add(key)

    def check_answer(self, asked: Asked, answer: httpx.Response) -> None:
        """What a caller was given for its money is the work of its own handler."""
        paid = answer.headers.get("PAYMENT-RESPONSE") is not None
        if not paid or answer.status_code >= 400:
            return
        if not self.by_call[asked.call]:
            self.fail(f"{asked.call} was answered {answer.status_code}, but no handler ran")
        if asked.route != "stream" and answer.content != f"done {asked.call}".encode():
            self.fail(f"{asked.call} was given {answer.content[:30]!r}")

    def grows(self, what: str, name: str, value: int) -> None:
        """A figure that never falls (I6)."""
        before = self.most_seen.get((what, name), 0)
        if value < before:
            self.fail(f"I6 {what} of {name} fell from {before} to {value}")
        self.most_seen[what, name] = value


def seq_of(request: httpx.Request) -> tuple[str, int]:
    """The session and seq of a signed request; nothing of another."""
    header = request.headers.get("PAYMENT-SIGNATURE", "")
    try:
        text = json.loads(base64.b64decode(header))["payload"]["voucher"]
        raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        return "esc_" + raw[48:64].hex(), int.from_bytes(raw[64:72], "big")
    except (ValueError, KeyError, TypeError):
        return "", 0

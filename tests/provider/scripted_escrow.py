"""An escrow of a few lines that does as a test says: it fails, lies, loses answers, or redeems."""

import json
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any

import httpx

from tests.support.payments import KEY_SET, NETWORK, NOW, PAY_TO, ROOT, ROOT_KEY
from x402mw.core import ids
from x402mw.core.amounts import display, to_atomic
from x402mw.core.strict import b64url_decode, b64url_encode
from x402mw.core.tokens import sign_key_set
from x402mw.core.vouchers import split_voucher
from x402mw_client.escrow import AsyncEscrowClient

URL = "http://127.0.0.1:1"


@dataclass
class Held:
    """One session at the escrow."""

    deposit: int = 1_000_000
    redeemed: int = 0
    released: int = 0
    state: str = "locked"
    change: int = 0
    journal: str = ""

    def as_json(self, session: bytes) -> dict[str, Any]:
        """The session in a verdict, or in a list of changes."""
        return {
            "escrow_id": ids.format_id(ids.ESCROW, session),
            "redeemed": display(self.redeemed),
            "released": display(self.released),
            "deposit": display(self.deposit),
            "state": self.state,
            "claim_until": NOW + 900,
        }


@dataclass
class ScriptedEscrow:
    """`calls` tells what was asked; the other fields are what a test may change."""

    calls: list[tuple[str, Any]] = field(default_factory=list)
    sessions: dict[bytes, Held] = field(default_factory=dict)
    serials: dict[str, int] = field(default_factory=dict)
    key_set: Any = KEY_SET
    root: bytes = ROOT
    root_key: bytes = ROOT_KEY
    date: float | None = NOW
    down: bool = False
    answer_lost: bool = False
    garbage: bytes | None = None
    status: int = 0
    poison: set[bytes] = field(default_factory=set)
    refusals: dict[bytes, str] = field(default_factory=dict)
    verdicts: dict[bytes, Any] = field(default_factory=dict)

    def client(self) -> AsyncEscrowClient:
        """A client of this escrow."""
        transport = httpx.MockTransport(self._answer)
        return AsyncEscrowClient(URL, "pf_live_test", client=httpx.AsyncClient(transport=transport))

    def asked(self, what: str) -> list[Any]:
        """What was asked of one path."""
        return [body for path, body in self.calls if path == what]

    def change(self, session: bytes, **changes: Any) -> None:
        """Something happens to a session; its journal, the newest if it is new, hears of it."""
        held = self.sessions.setdefault(session, Held(journal=list(self.serials)[-1]))
        for name, value in changes.items():
            setattr(held, name, value)
        held.change = 1 + max(one.change for one in self.sessions.values())

    def _answer(self, request: httpx.Request) -> httpx.Response:
        if self.down:
            raise httpx.ConnectError("down")
        body = json.loads(request.content) if request.content else dict(request.url.params)
        path = request.url.path.rpartition("/")[2]
        answer = self._handle(request.url.path, body)
        self.calls.append((path, body))
        if self.answer_lost:
            raise httpx.ReadTimeout("lost")
        if self.garbage is not None:
            return httpx.Response(200, content=self.garbage)
        headers = {"Date": formatdate(self.date, usegmt=True)} if self.date else {}
        status, content = answer
        return httpx.Response(self.status or status, json=content, headers=headers)

    def _handle(self, path: str, body: Any) -> tuple[int, Any]:
        if path.endswith("/x402mw-keys"):
            return 200, {
                "network": NETWORK,
                "root_key": b64url_encode(self.root_key),
                "key_set": sign_key_set(self.key_set, self.root),
            }
        if path.endswith("/me"):
            return 200, {"agent_id": PAY_TO, "name": "p", "balance": "0.00", "created_at": NOW}
        if "/journals/" in path:
            journal = path.rpartition("/")[2]
            self.serials.setdefault(journal, 0)
            return 200, {"journal": journal, "agent_id": PAY_TO, **body}
        seen = self.serials[body["journal"]]
        self.serials[body["journal"]] = max(seen, int(body["serial"]))
        if path.endswith("/changes"):
            return 200, {"serial": seen, **self._changes(body)}
        return self._redeem(body["items"], seen)

    def _changes(self, query: Any) -> dict[str, Any]:
        since = int(query["since"])
        held = sorted(self.sessions.items(), key=lambda pair: pair[1].change)
        mine = [pair for pair in held if pair[1].journal == query["journal"]]
        page = [pair for pair in mine if pair[1].change > since][: int(query["limit"])]
        changes = [one.as_json(session) for session, one in page]
        return {"next": page[-1][1].change if page else since, "changes": changes}

    def _redeem(self, items: list[Any], seen: int) -> tuple[int, Any]:
        sessions = [_session(item) for item in items]
        if self.poison.intersection(sessions):
            code = "invalid_body"
            kind = f"urn:x402mw:problem:{code}"
            return 422, {"type": kind, "code": code, "title": "x", "status": 422, "detail": "x"}
        verdicts = [self._verdict(*pair) for pair in zip(sessions, items, strict=True)]
        return 200, {"serial": seen, "items": verdicts}

    def _verdict(self, session: bytes, item: Any) -> Any:
        if session in self.verdicts:
            return self.verdicts[session]
        if session in self.refusals:
            return {"ok": False, "code": self.refusals[session], "detail": "no"}
        held = self.sessions.setdefault(session, Held())
        amount = to_atomic(item["amount"])
        held.redeemed = max(held.redeemed, amount)
        held.released = max(held.released, amount)
        if item.get("final"):
            held.state = "settled"
        return {"ok": True, **held.as_json(session)}


def _session(item: Any) -> bytes:
    if "voucher" not in item:
        return ids.parse_id(ids.ESCROW, item["escrow_id"])
    return split_voucher(b64url_decode(item["voucher"], 176)).voucher.session

"""The escrow's API for sessions in memory, with real keys and no database."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from tests.client.scripted import Clock
from tests.support import payments as p
from x402mw.core import ids, keys, tokens
from x402mw.core.amounts import ZERO, display, to_atomic
from x402mw.core.strict import b64url_decode, b64url_encode
from x402mw.core.tokens import SessionToken


@dataclass
class ScriptedEscrow:
    """The escrow's API for sessions, with real keys and no database."""

    clock: Clock
    balance: int = 10_000_000
    sessions: dict[str, dict[str, Any]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    away: bool = False
    token_seconds: int = 600
    root: bytes = p.ROOT
    stored: dict[str, dict[str, Any]] = field(default_factory=dict)
    script: list[Callable[[httpx.Response], httpx.Response]] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        """Answers one API call."""
        if self.away:
            raise httpx.ConnectError("the escrow is away")
        path = request.url.path
        self.calls.append(f"{request.method} {path}")
        body = json.loads(request.content or b"{}")
        if path == "/.well-known/x402mw-keys":
            return self._keys()
        if path == "/api/v1/escrow" and request.method == "GET":
            items = [self._view(session) for session in self.sessions.values()]
            return httpx.Response(200, json={"items": items, "next": None})
        if path == "/api/v1/escrow":
            key = request.headers["Idempotency-Key"]
            answer = self._stored(key, body) or self._open(body)
            self.stored.setdefault(key, {"body": body, "answer": answer.json()})
            return self.script.pop(0)(answer) if self.script else answer
        session = self.sessions[path.split("/")[4]]
        if request.method == "GET":
            return httpx.Response(200, json=self._view(session))
        return self._act(session, path.split("/")[-1], body)

    def count(self, what: str) -> int:
        """How often an API call whose line ends in `what` came."""
        return sum(line.endswith(what) for line in self.calls)

    def _keys(self) -> httpx.Response:
        key_set = replace(p.KEY_SET, not_after=int(self.clock()) + 86_400)
        return httpx.Response(
            200,
            json={
                "network": p.NETWORK,
                "root_key": b64url_encode(keys.public_key(self.root)),
                "key_set": tokens.sign_key_set(key_set, self.root),
            },
        )

    def _stored(self, key: str, body: dict[str, Any]) -> httpx.Response | None:
        found = self.stored.get(key)
        if found is None:
            return None
        assert found["body"] == body, "one key, one request"
        return httpx.Response(200 if "escrow_id" in found["answer"] else 409, json=found["answer"])

    def lose_answer(self, answer: httpx.Response) -> httpx.Response:
        """The session is opened, but nobody hears of it."""
        raise httpx.ReadError("lost")

    def _open(self, body: dict[str, Any]) -> httpx.Response:
        amount = to_atomic(body["amount"])
        if amount > self.balance:
            return self._refuse("insufficient_funds", balance=display(self.balance))
        self.balance -= amount
        name = ids.format_id(ids.ESCROW, os.urandom(16))
        life = body.get("expires_in_seconds", 86_400)
        self.sessions[name] = {
            "escrow_id": name,
            "deposit": amount,
            "status": "locked",
            "expires_at": int(self.clock()) + life,
            **body,
        }
        return self._answer(self.sessions[name])

    def _act(self, session: dict[str, Any], action: str, body: dict[str, Any]) -> httpx.Response:
        if session["status"] != "locked":
            return self._refuse("invalid_state")
        if action == "topup":
            amount = to_atomic(body["amount"])
            if amount > self.balance:
                return self._refuse("insufficient_funds", balance=display(self.balance))
            self.balance -= amount
            session["deposit"] += amount
        if action == "close":
            session["status"] = "closing"
        return self._answer(session)

    def settle(self, session: bytes, charged: int) -> None:
        """The provider's final redemption: what is left of the deposit returns at once."""
        found = self.sessions.get(ids.format_id(ids.ESCROW, session))
        if found is not None:
            found |= {"status": "settled" if charged else "refunded", "released": charged}

    def _refuse(self, code: str, **more: str) -> httpx.Response:
        problem = {"type": f"urn:x402mw:problem:{code}", "code": code, "detail": code, **more}
        return httpx.Response(409, json=problem)

    def _answer(self, session: dict[str, Any]) -> httpx.Response:
        return httpx.Response(200, json=self._view(session) | {"token": self.token(session)})

    def token(self, session: dict[str, Any]) -> str:
        """A session token as of now."""
        now = int(self.clock())
        return tokens.sign_session_token(
            SessionToken(
                network=p.NETWORK,
                session=ids.parse_id(ids.ESCROW, session["escrow_id"]),
                pay_to=session["to_agent_id"],
                journal=ids.parse_id(ids.JOURNAL, session["journal"]),
                session_key=b64url_decode(session["session_key"], 32),
                receipt_key=p.RECEIPT_KEY,
                payer=p.PAYER,
                asset="USDC",
                deposit=session["deposit"],
                released=ZERO,
                exp=now + self.token_seconds,
                claim_until=now + self.token_seconds + 300,
            ),
            p.SIGNER,
        )

    def _view(self, session: dict[str, Any]) -> dict[str, Any]:
        return {
            "escrow_id": session["escrow_id"],
            "status": session["status"],
            "from_agent_id": p.PAYER,
            "to_agent_id": session["to_agent_id"],
            "asset": "USDC",
            "amount": display(session["deposit"]),
            "released": display(session.get("released", 0)),
            "refunded": "0.00",
            "remaining": display(session["deposit"]),
            "fee": "0.00",
            "session_key": session["session_key"],
            "journal": session["journal"],
            "expires_at": session["expires_at"],
        }

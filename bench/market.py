"""A market for the bench: a real escrow process, and a buyer that signs ahead of the clock.

Signing is done before a round begins, so what is measured is the server alone.
"""

import base64
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from bench.processes import Process, free_port, running
from x402mw.core import headers, ids, keys, vouchers
from x402mw.core.amounts import Atomic
from x402mw.core.messages import EscrowExtra, PaymentRequirements, validate
from x402mw.core.strict import b64url_encode
from x402mw.core.terms import read_terms
from x402mw_client.escrow import EscrowClient

ROOT_SEED = hashlib.sha256(b"x402mw bench root").digest()
DEPOSIT = Atomic(50_000_000)
RENEW_SECONDS = 240
EXPIRES_SECONDS = 280
_EMPTY = hashlib.sha256(b"").digest()


@dataclass(frozen=True)
class Account:
    """An agent's account at the escrow."""

    agent: str
    api_key: str


@dataclass
class Market:
    """A running escrow, and accounts on demand."""

    escrow: Process
    folder: Path
    _names: Iterator[int] = field(default_factory=lambda: iter(range(10_000)))

    def account(self, balance: str = "") -> Account:
        """Registers an agent, and books money for it."""
        with httpx.Client(base_url=self.escrow.url, timeout=30) as http:
            answer = http.post("/api/v1/agents", json={"name": f"bench {next(self._names)}"})
        found = answer.raise_for_status().json()
        account = Account(found["agent_id"], found["api_key"])
        if balance:
            command(self.folder, "escrow", "deposit", account.agent, balance)
        return account

    def provider(self, name: str) -> dict[str, str]:
        """The settings of a new provider."""
        journal = str(self.folder / f"{name}.db")
        return {
            "escrow": self.escrow.url,
            "api_key": self.account().api_key,
            "journal": journal,
        }


@contextlib.contextmanager
def open_market(folder: Path) -> Iterator[Market]:
    """Runs an escrow on an empty database while the block lasts."""
    port = free_port()
    arguments = ("escrow", "serve", "--db", str(folder / "escrow.db"), "--port", str(port))
    with running("escrow", folder, "x402mw.cli", *arguments, port=port, settings=_root()) as escrow:
        yield Market(escrow, folder)


def command(folder: Path, *arguments: str) -> None:
    """Runs an operator's command on the escrow's database."""
    subprocess.run(
        [sys.executable, "-m", "x402mw.cli", *arguments, "--db", str(folder / "escrow.db")],
        check=True,
        capture_output=True,
        env={**os.environ, **_root()},
    )


def _root() -> dict[str, str]:
    return {"X402MW_ROOT_KEY": b64url_encode(ROOT_SEED)}


@dataclass
class _Session:
    raw: bytes
    token: str
    secret: bytes
    cumulative: int = 0


class Buyer:
    """Some sessions with one provider, and payments out of them in turn."""

    def __init__(self, market: Market, account: Account, shop: str, *, sessions: int) -> None:
        self.shop = shop
        self._escrow = EscrowClient(market.escrow.url, account.api_key)
        found = self._escrow.keys()
        self._network_id = vouchers.network_id(found.network, found.root_key)
        self._offers: dict[str, dict[str, Any]] = {}
        self._renewed = time.monotonic()
        offer = self.offer("/item")
        self._journal = ids.parse_id(ids.JOURNAL, offer["extra"]["journal"])
        self._sessions = [self._open(offer["payTo"], number) for number in range(sessions)]

    def _open(self, pay_to: str, number: int) -> _Session:
        seed = hashlib.sha256(f"{self.shop} {number} {time.time_ns()}".encode()).digest()
        record = self._escrow.open_session(
            pay_to, DEPOSIT, session_key=keys.public_key(seed), journal=self._journal
        )
        if record.token is None:
            raise RuntimeError("the escrow gave no token")
        return _Session(record.session, record.token, keys.secret_key(seed))

    def offer(self, target: str) -> dict[str, Any]:
        """The provider's offer for a path, asked for once."""
        if target not in self._offers:
            answer = httpx.get(self.shop + target)
            if answer.status_code != 402:
                raise RuntimeError(f"{target} is not for sale: {answer.status_code}")
            content = json.loads(base64.b64decode(answer.headers[headers.PAYMENT_REQUIRED]))
            self._offers[target] = content["accepts"][0]
        return self._offers[target]

    def _renew(self) -> None:
        if time.monotonic() - self._renewed > RENEW_SECONDS:
            self._renewed = time.monotonic()
            for session in self._sessions:
                session.token = self._escrow.renew_token(session.raw).token or session.token

    def payments(self, target: str, count: int, *, spoil: bool = False) -> list[bytes]:
        """Values of the payment header for GET requests; spoiled ones carry a wrong signature."""
        self._renew()
        offer = self.offer(target)
        extra = validate(EscrowExtra, offer["extra"])
        terms = read_terms(validate(PaymentRequirements, offer), extra, self._network_id)
        expires = int(time.time() + EXPIRES_SECONDS) * 1000
        bound = vouchers.BoundRequest(
            binding=0,
            method="GET",
            origin=self.shop,
            target=target,
            body_hash=_EMPTY,
            amount=terms.amount,
            expires=expires,
            terms_id=terms.id,
        )
        request_hash = vouchers.hash_request(bound)
        tail = {"expires": expires, "binding": 0}
        made = []
        for number in range(count):
            session = self._sessions[number % len(self._sessions)]
            if not spoil:
                session.cumulative += terms.amount
            wire = self._sign(session, request_hash, spoil=spoil)
            inner = {"voucher": wire, "token": session.token, **tail}
            content = {"x402Version": 2, "payload": inner, "accepted": offer}
            made.append(base64.b64encode(json.dumps(content, separators=(",", ":")).encode()))
        return made

    def _sign(self, session: _Session, request_hash: bytes, *, spoil: bool) -> str:
        seq = int.from_bytes(os.urandom(8), "big") >> 1
        cumulative = Atomic(session.cumulative)
        voucher = vouchers.Voucher(self._network_id, session.raw, seq, cumulative, request_hash)
        signed = vouchers.sign_voucher(voucher, session.secret)
        if spoil:
            return b64url_encode(
                signed.raw + signed.signature[:-40] + bytes(8) + signed.signature[-32:]
            )
        return signed.wire

    def requests(self, target: str, count: int, *, spoil: bool = False) -> list[bytes]:
        """Whole HTTP requests, each with a payment of its own."""
        head = f"GET {target} HTTP/1.1\r\nhost: {self.shop.removeprefix('http://')}\r\n".encode()
        return [
            head + b"payment-signature: " + value + b"\r\n\r\n"
            for value in self.payments(target, count, spoil=spoil)
        ]

    @property
    def signed_total(self) -> int:
        """What all sessions together were signed for, in atomic units."""
        return sum(session.cumulative for session in self._sessions)

    def close(self) -> None:
        """Ends the connections."""
        self._escrow.close_connections()

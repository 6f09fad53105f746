"""Other people's clients, as the guides have them: a base URL, a key and three ways to send JSON.

Nothing of ours is imported here, no idempotency key is sent, and amounts come as each author
wrote them.
"""

import json
import subprocess
from typing import Any, Protocol

import httpx
import requests


class Send(Protocol):
    """Sends one request and returns the status and the parsed JSON."""

    def __call__(
        self, method: str, url: str, key: str, body: dict[str, Any] | None = None
    ) -> tuple[int, Any]: ...


def by_requests(
    method: str, url: str, key: str, body: dict[str, Any] | None = None
) -> tuple[int, Any]:
    """With `requests`, as most samples do."""
    headers = {"Authorization": f"Bearer {key}"}
    answer = requests.request(method, url, json=body, headers=headers, timeout=30)
    return answer.status_code, answer.json()


def by_httpx(
    method: str, url: str, key: str, body: dict[str, Any] | None = None
) -> tuple[int, Any]:
    """With `httpx`."""
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(verify=False) as http:
        answer = http.request(method, url, json=body, headers=headers, timeout=30)
    return answer.status_code, answer.json()


def by_curl(method: str, url: str, key: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    """With `curl`, whose `-d` alone would call JSON a form."""
    sign_in, status_last = ["-H", f"Authorization: Bearer {key}"], ["-w", "\n%{http_code}"]
    data = [] if body is None else ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    done = subprocess.run(
        ["curl", "-sS", "-X", method, *status_last, *sign_in, *data, url],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    text, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(text)


class NumberDialect:
    """S0: amounts are JSON numbers in USDC, money goes to a `provider`, seconds to auto-release."""

    def __init__(self, send: Send, base: str, key: str) -> None:
        self.send, self.base, self.key = send, base, key

    def create_escrow(self, amount: float, provider: str, session_hours: float) -> str:
        """Locks, and returns the id."""
        body = {
            "amount_usdc": amount,
            "provider": provider,
            "description": "inference session",
            "auto_release_seconds": int(session_hours * 3600),
        }
        status, answer = self.send("POST", f"{self.base}/escrow", self.key, body)
        assert status in (200, 201), answer
        return str(answer["escrow_id"])

    def release(self, escrow_id: str, amount: float, recipient: str, memo: str) -> tuple[int, Any]:
        """Pays a batch, rounded to 8 places as the sample does."""
        body = {"amount_usdc": round(amount, 8), "recipient": recipient, "memo": memo}
        return self.send("POST", f"{self.base}/escrow/{escrow_id}/release", self.key, body)

    def balance(self, escrow_id: str) -> float:
        """What is left; the sample compares and formats it as a number."""
        status, answer = self.send("GET", f"{self.base}/escrow/{escrow_id}", self.key)
        assert status == 200, answer
        return answer["balance_usdc"]  # type: ignore[no-any-return]

    def close(self, escrow_id: str) -> Any:
        """Ends it; the remainder goes back to the buyer."""
        status, answer = self.send("POST", f"{self.base}/escrow/{escrow_id}/close", self.key)
        assert status == 200, answer
        return answer


class TextBilling:
    """S1 and S2: amounts are texts, money goes `to_agent_id`, hours to auto-release."""

    def __init__(self, send: Send, base: str, key: str) -> None:
        self.send, self.base, self.key = send, base, key

    def lock(self, to: str, amount: str, memo: str, auto_hours: int | None = None) -> Any:
        """Locks; the sample leaves out hours that it was not given."""
        body: dict[str, Any] = {"to_agent_id": to, "amount": amount, "memo": memo}
        if auto_hours:
            body["auto_release_hours"] = auto_hours
        status, answer = self.send("POST", f"{self.base}/escrow", self.key, body)
        assert status in (200, 201), answer
        return answer

    def release(self, eid: str, amount: str | None = None, memo: str = "") -> Any:
        """Pays all of it, or an amount by the other path."""
        if amount is None:
            return self._post(f"/escrow/{eid}/release")
        return self._post(f"/escrow/{eid}/release-partial", {"amount": amount, "memo": memo})

    def refund(self, eid: str, amount: str | None = None) -> Any:
        """Takes back all of it, or an amount."""
        return self._post(f"/escrow/{eid}/refund", {"amount": amount} if amount else None)

    def status(self, eid: str) -> Any:
        """Shows it."""
        return self.send("GET", f"{self.base}/escrow/{eid}", self.key)[1]

    def list(self, agent_id: str) -> Any:
        """Shows all."""
        return self.send("GET", f"{self.base}/escrow?agent_id={agent_id}", self.key)[1]

    def _post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        status, answer = self.send("POST", self.base + path, self.key, body)
        assert status == 200, answer
        return answer

"""The receiver's side of webhooks: true, fresh and whole, or one clear error."""

import hashlib
import hmac
import json
from typing import Any

import pytest

from x402mw_client.webhooks import Event, Seen, WebhookRefused, read_event, verify

NOW, SECRET = 1_800_000_000, "whsec_one"
EVENT = {
    "id": "812.1",
    "type": "closed",
    "escrow_id": "esc_1",
    "at": NOW,
    "effective_at": NOW - 5,
    "amount": "1.50",
    "kind": "deadline",
    "data": {"ended": "expired_refund"},
}
BODY = json.dumps(EVENT).encode()


def headers(
    body: bytes = BODY, secret: str = SECRET, at: object = NOW, event_id: str = "812.1"
) -> dict[str, str]:
    """What the escrow sends with a body."""
    text = f"{at}.{event_id}.".encode() + body
    signature = hmac.new(secret.encode(), text, hashlib.sha256).hexdigest()
    return {
        "X402MW-Timestamp": str(at),
        "X402MW-Event-Id": event_id,
        "X402MW-Signature": f"v1={signature}",
    }


def test_a_true_delivery_is_an_event() -> None:
    """Webhooks: what was signed comes back typed, amounts in atomic units."""
    assert verify(SECRET, headers(), BODY, NOW) == Event(**EVENT | {"amount": 1_500_000})
    lower = {name.lower(): value for name, value in headers().items()}
    assert verify(SECRET, lower, BODY, NOW + 299).id == "812.1"


def test_two_secrets_during_a_rotation() -> None:
    """Rotation: either secret at the receiver, and either signature of two, will do."""
    assert verify(["whsec_new", SECRET], headers(), BODY, NOW).id == "812.1"
    both = headers() | {
        "X402MW-Signature": headers(secret="whsec_new")["X402MW-Signature"]
        + ", "
        + headers()["X402MW-Signature"]
    }
    assert verify(SECRET, both, BODY, NOW).id == "812.1"


OTHER = json.dumps(EVENT | {"amount": "9.00"}).encode()
REFUSED: list[tuple[dict[str, str], bytes, float, str]] = [
    (headers(), OTHER, NOW, "not signed"),
    (headers(secret="whsec_two"), BODY, NOW, "not signed"),
    (headers(event_id="813"), BODY, NOW, "another event"),
    (headers() | {"X402MW-Event-Id": "813"}, BODY, NOW, "not signed"),
    (headers() | {"X402MW-Timestamp": str(NOW + 1)}, BODY, NOW, "not signed"),
    (headers() | {"X402MW-Signature": ""}, BODY, NOW, "not signed"),
    (headers() | {"X402MW-Signature": "v1=é"}, BODY, NOW, "not signed"),
    (headers() | {"X402MW-Signature": ",".join(["v1=0"] * 9)}, BODY, NOW, "not signed"),
    (
        headers() | {"X402MW-Signature": headers()["X402MW-Signature"].replace("v1=", "v0=")},
        BODY,
        NOW,
        "not signed",
    ),
    (headers(), BODY, NOW + 301, "too old"),
    (headers(), BODY, NOW - 301, "too old"),
    (headers(at="1e9"), BODY, NOW, "lacks"),
    (headers(at="-1"), BODY, NOW, "lacks"),
    ({}, BODY, NOW, "lacks"),
    (headers(b"[]"), b"[]", NOW, "no event"),
    (headers(b"\xff"), b"\xff", NOW, "no event"),
    (headers(b"{}"), b"{}", NOW, "no event"),
    (headers(), b"x" * 70_000, NOW, "at most"),
]


@pytest.mark.parametrize(("given", "body", "now", "told"), REFUSED)
def test_anything_else_is_one_error(
    given: dict[str, str], body: bytes, now: float, told: str
) -> None:
    """Webhooks: forged, replayed later, changed or broken deliveries are refused, and say why."""
    with pytest.raises(WebhookRefused, match=told):
        verify(SECRET, given, body, now)


@pytest.mark.parametrize("secret", ["", [], [""], [SECRET, ""]])
def test_no_secret_is_a_mistake_of_ours(secret: Any) -> None:
    """Webhooks: an empty secret would let anyone sign; it is an error, never a pass."""
    with pytest.raises(ValueError, match="secret"):
        verify(secret, headers(secret=""), BODY, NOW)


def test_what_was_seen_is_remembered() -> None:
    """Replay: an id is new once, as long as it is among the newest."""
    seen = Seen(most=2)
    assert [seen.add(each) for each in ("1", "1", "2", "3", "3", "1")] == [
        *(True, False, True, True, False, True),
    ]


def test_a_restored_escrow_tells_news_under_an_old_id() -> None:
    """Replay: an id that a restore has given again at a later time is another event, and new."""
    later = {**json.loads(BODY), "at": NOW + 60}
    events = [read_event(body) for body in (BODY, BODY, json.dumps(later).encode())]
    seen = Seen()
    assert len({event.id for event in events}) == 1
    assert [seen.add(event.key) for event in events] == [True, False, True]

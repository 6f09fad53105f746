"""For receivers of the escrow's webhooks: a delivery is true, fresh and new, or it is refused.

    event = verify(secret, request.headers, body, time.time())
    if seen.add(event.key):
        ...

Deliveries come at least once, and those of one escrow in order. `docs/events.md`.
"""

import hashlib
import hmac
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from x402mw.core.amounts import Atomic, to_atomic
from x402mw.core.errors import AmountInvalid, Malformed, RemoteError
from x402mw.core.strict import loads_object

TIMESTAMP, SIGNATURE, EVENT_ID = "x402mw-timestamp", "x402mw-signature", "x402mw-event-id"
TOLERANCE_SECONDS = 300
BODY_BYTES_MAX = 64 * 1024
SIGNATURES_MAX = 4
_TIME = re.compile(r"[0-9]{1,12}", re.ASCII)
_ID = re.compile(r"[0-9]{1,18}(\.[0-9]{1,3})?", re.ASCII)


class WebhookRefused(RemoteError):
    """This is no delivery of the escrow, or not one for now. Answer it with 400."""

    code: ClassVar[str] = "webhook_refused"


@dataclass(frozen=True, slots=True)
class Event:
    """What happened: `amount` in atomic units moved, `at` when it was written (seconds)."""

    id: str
    type: str
    escrow_id: str | None
    at: int
    effective_at: int
    amount: Atomic
    kind: str
    data: Mapping[str, Any]

    @property
    def key(self) -> str:
        """What tells it from all others: a restored escrow gives ids again, at a later time."""
        return f"{self.id}@{self.at}"


def verify(
    secret: str | Iterable[str],
    headers: Mapping[str, str],
    body: bytes,
    now: float,
    tolerance: float = TOLERANCE_SECONDS,
) -> Event:
    """Returns the event of a true and fresh delivery, or raises `WebhookRefused`.

    `body` is what was received, byte for byte. While a secret is being replaced, give both.
    """
    secrets = [secret] if isinstance(secret, str) else list(secret)
    if not secrets or not all(secrets):
        raise ValueError("a webhook is verified with its secret")
    given = _headers(headers)
    if len(body) > BODY_BYTES_MAX:
        raise WebhookRefused(f"a delivery has at most {BODY_BYTES_MAX} bytes")
    _check_signature(secrets, given, body)
    if abs(now - int(given[TIMESTAMP])) > tolerance:
        raise WebhookRefused("the delivery is too old, or one of the clocks is wrong")
    event = read_event(body)
    if event.id != given[EVENT_ID]:
        raise WebhookRefused("the delivery names another event than it holds")
    return event


def _headers(headers: Mapping[str, str]) -> dict[str, str]:
    lower = {name.lower(): value for name, value in headers.items()}
    found = {name: lower.get(name, "") for name in (TIMESTAMP, SIGNATURE, EVENT_ID)}
    if not (_TIME.fullmatch(found[TIMESTAMP]) and _ID.fullmatch(found[EVENT_ID])):
        raise WebhookRefused("the delivery lacks its time or the id of its event")
    return found


def _check_signature(secrets: list[str], given: dict[str, str], body: bytes) -> None:
    signed = f"{given[TIMESTAMP]}.{given[EVENT_ID]}.".encode() + body
    expected = [hmac.new(each.encode(), signed, hashlib.sha256).hexdigest() for each in secrets]
    offered = [text.strip() for text in given[SIGNATURE].split(",")][:SIGNATURES_MAX]
    matches = [
        hmac.compare_digest(f"v1={right}".encode(), text.encode())
        for text in offered
        for right in expected
    ]
    if not any(matches):
        raise WebhookRefused("the delivery is not signed with this secret")


class _Body(BaseModel):
    # Members we do not know are ignored: the signer is trusted, and may learn new words first.
    model_config = ConfigDict(strict=True, extra="ignore")
    id: str
    type: str
    escrow_id: str | None
    at: Annotated[int, Field(ge=0)]
    effective_at: Annotated[int, Field(ge=0)]
    amount: str
    kind: str
    data: dict[str, Any]


def read_event(body: bytes) -> Event:
    """Reads an event, or raises `WebhookRefused`."""
    try:
        read = _Body.model_validate(loads_object(body))
        return Event(**read.model_dump() | {"amount": to_atomic(read.amount)})
    except (Malformed, ValidationError, AmountInvalid):
        raise WebhookRefused("the delivery holds no event") from None


class Seen:
    """Remembers the keys of the newest events, so that what comes twice is done once.

    In memory; keep keys beside what they caused where that must survive a restart.
    """

    def __init__(self, most: int = 10_000) -> None:
        self._most = most
        self._keys: OrderedDict[str, None] = OrderedDict()

    def add(self, key: str) -> bool:
        """Notes the key of an event; tells whether it is new."""
        if key in self._keys:
            return False
        self._keys[key] = None
        if len(self._keys) > self._most:
            self._keys.popitem(last=False)
        return True

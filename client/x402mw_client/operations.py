"""What can be asked of the escrow, as plain values: operations and what their answers hold.

Here amounts are atomic units, ids and keys raw bytes (agents' ids are text, as in `payTo`), times
whole seconds; on the wire amounts are display strings (`docs/escrow.md`). `escrow` carries them
out.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from x402mw.core import ids
from x402mw.core.amounts import ZERO, Atomic, display, to_atomic, to_atomic_floor
from x402mw.core.errors import X402mwError
from x402mw.core.keys import PUBLIC_KEY_BYTES
from x402mw.core.strict import b64url_decode, b64url_encode

PAUSES_SECONDS = (0.0, 0.2, 1.0)
"""What is safe to repeat is tried three times, after these pauses."""

T = TypeVar("T", bound=BaseModel)

# What the answers hold.


def _reads(reader: Callable[[str], Any]) -> BeforeValidator:
    def read(value: object) -> Any:
        if not isinstance(value, str):
            raise ValueError("a string belongs here")  # noqa: TRY004 (pydantic wants ValueError)
        try:
            return reader(value)
        except X402mwError as error:
            raise ValueError(str(error)) from None

    return BeforeValidator(read)


Amount = Annotated[Atomic, _reads(to_atomic)]
# A manual escrow may carry a fraction of a unit; whole units are what moves.
Whole = Annotated[Atomic, _reads(to_atomic_floor)]
SessionId = Annotated[bytes, _reads(lambda text: ids.parse_id(ids.ESCROW, text))]
JournalId = Annotated[bytes, _reads(lambda text: ids.parse_id(ids.JOURNAL, text))]
Key = Annotated[bytes, _reads(lambda text: b64url_decode(text, PUBLIC_KEY_BYTES))]


class _Answer(BaseModel):
    # The escrow may learn to say more before its clients learn to listen.
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", validate_by_name=True)


class Health(_Answer):
    """Whether the escrow works, and its clock."""

    status: str
    network: str
    time: int


class EscrowKeys(_Answer):
    """The escrow's network, root key, and its key set as signed text (`tokens.open_key_set`)."""

    network: str
    root_key: Key
    key_set: str


class NewAgent(_Answer):
    """A fresh account; the API key is shown this once."""

    agent_id: str
    api_key: str = Field(repr=False)
    name: str
    balance: Amount


class Agent(_Answer):
    """The account behind our API key."""

    agent_id: str
    name: str
    balance: Amount
    created_at: int


class Claimed(_Answer):
    """What the faucet gave."""

    claimed: Amount
    balance: Amount


class Journal(_Answer):
    """A registered journal of a provider."""

    journal: JournalId
    agent_id: str
    receipt_key: Key


class EscrowRecord(_Answer):
    """One escrow. `deposit` is what was locked in all, `token` the session token if one came."""

    session: SessionId = Field(alias="escrow_id")
    status: str
    from_agent_id: str
    to_agent_id: str
    asset: str
    deposit: Amount = Field(alias="amount")
    released: Whole
    refunded: Whole
    remaining: Whole
    fee: Whole
    redeemed: Whole = ZERO
    session_key: Key | None = None
    journal: JournalId | None = None
    memo: str | None = None
    expires_at: int
    claim_until: int | None = None
    closing_deadline: int | None = None
    close_reason: str | None = None
    token: str | None = Field(default=None, repr=False)


class EscrowPage(_Answer):
    """One page of a listing; `next` continues it (`after`)."""

    items: list[EscrowRecord]
    next: str | None = None


class Verdict(_Answer):
    """What became of one item of a redemption; a refused one has a `code` and a `detail`."""

    ok: bool
    session: SessionId | None = Field(default=None, alias="escrow_id")
    redeemed: Whole | None = None
    released: Whole | None = None
    deposit: Amount | None = None
    state: str | None = None
    code: str | None = None
    detail: str | None = None


class Redeemed(_Answer):
    """The verdicts in order, and the highest write serial the escrow had seen before this call."""

    serial: int
    items: list[Verdict]


class Change(_Answer):
    """A session of one journal as it now stands."""

    session: SessionId = Field(alias="escrow_id")
    state: str
    deposit: Amount
    redeemed: Whole
    released: Whole
    claim_until: int | None = None


class Changes(_Answer):
    """What changed since a cursor; `next` is the new cursor, `serial` as in `Redeemed`."""

    next: int
    serial: int
    changes: list[Change]


@dataclass(frozen=True, slots=True)
class RedeemItem:
    """One line of a redemption: the newest signed voucher (176 bytes) and what was charged.

    Without a voucher, `session` is closed with nothing charged (`amount` 0, `final`).
    """

    amount: Atomic
    voucher: bytes | None = None
    session: bytes | None = None
    final: bool = False

    def as_json(self) -> dict[str, Any]:
        """The line as the API takes it."""
        line: dict[str, Any] = {"amount": display(self.amount)}
        if self.voucher is not None:
            line["voucher"] = b64url_encode(self.voucher)
        if self.session is not None:
            line["escrow_id"] = ids.format_id(ids.ESCROW, self.session)
        return line | ({"final": True} if self.final else {})


# The operations, as values.


@dataclass(frozen=True, slots=True)
class Operation(Generic[T]):
    """One request to the escrow, and what its answer is. `key` is its `Idempotency-Key`."""

    answer: type[T]
    method: str
    path: str
    body: dict[str, Any] | None = None
    query: dict[str, str | int] = field(default_factory=dict)
    key: str | None = None
    repeatable: bool = True

    @property
    def pauses(self) -> tuple[float, ...]:
        """The seconds to wait before each attempt."""
        return PAUSES_SECONDS if self.repeatable else PAUSES_SECONDS[:1]


def _move(
    answer: type[T], path: str, body: dict[str, Any] | None = None, key: str | None = None
) -> Operation[T]:
    """A POST that moves money: always under an idempotency key."""
    return Operation(answer, "POST", path, body, key=key or secrets.token_urlsafe(24))


def _path(session: bytes, action: str = "") -> str:
    return f"/api/v1/escrow/{ids.format_id(ids.ESCROW, session)}{action}"


def health() -> Operation[Health]:
    """Asks whether the escrow works."""
    return Operation(Health, "GET", "/health")


def keys() -> Operation[EscrowKeys]:
    """Fetches the escrow's root key and key set."""
    return Operation(EscrowKeys, "GET", "/.well-known/x402mw-keys")


def register_agent(name: str) -> Operation[NewAgent]:
    """Opens an account. Not repeated by itself: a lost answer would leave a second account."""
    return Operation(NewAgent, "POST", "/api/v1/agents", {"name": name}, repeatable=False)


def me() -> Operation[Agent]:
    """Shows the account behind our API key."""
    return Operation(Agent, "GET", "/api/v1/agents/me")


def claim_faucet(*, key: str | None = None) -> Operation[Claimed]:
    """Asks the faucet for test money."""
    return _move(Claimed, "/api/v1/faucet/claim", key=key)


def register_journal(journal: bytes, receipt_key: bytes) -> Operation[Journal]:
    """Registers a provider's journal with the public half of its receipt key."""
    path = f"/api/v1/journals/{ids.format_id(ids.JOURNAL, journal)}"
    return Operation(Journal, "PUT", path, {"receipt_key": b64url_encode(receipt_key)})


def open_session(
    pay_to: str,
    amount: Atomic,
    *,
    session_key: bytes,
    journal: bytes,
    expires_in_seconds: int | None = None,
    memo: str | None = None,
    key: str | None = None,
) -> Operation[EscrowRecord]:
    """Locks `amount` for `pay_to`, to be paid by vouchers of `session_key` (the public half)."""
    body: dict[str, Any] = {
        "to_agent_id": pay_to,
        "amount": display(amount),
        "session_key": b64url_encode(session_key),
        "journal": ids.format_id(ids.JOURNAL, journal),
    }
    if expires_in_seconds is not None:
        body["expires_in_seconds"] = expires_in_seconds
    if memo is not None:
        body["memo"] = memo
    return _move(EscrowRecord, "/api/v1/escrow", body, key)


def renew_token(session: bytes) -> Operation[EscrowRecord]:
    """Asks for a fresh session token."""
    return Operation(EscrowRecord, "POST", _path(session, "/token"))


def topup(session: bytes, amount: Atomic, *, key: str | None = None) -> Operation[EscrowRecord]:
    """Adds `amount` to the deposit; the answer carries a fresh token."""
    return _move(EscrowRecord, _path(session, "/topup"), {"amount": display(amount)}, key)


def release(
    session: bytes, cumulative: Atomic, *, key: str | None = None
) -> Operation[EscrowRecord]:
    """Pays the provider by hand, up to a total of `cumulative`."""
    body = {"cumulative": display(cumulative)}
    return _move(EscrowRecord, _path(session, "/release"), body, key)


def close(session: bytes, *, key: str | None = None) -> Operation[EscrowRecord]:
    """Closes a session. By the buyer: the rest returns once its last token can no longer claim."""
    return _move(EscrowRecord, _path(session, "/close"), {}, key)


def get(session: bytes) -> Operation[EscrowRecord]:
    """Shows one escrow of ours."""
    return Operation(EscrowRecord, "GET", _path(session))


def list_escrows(
    *,
    role: str | None = None,
    status: str | None = None,
    limit: int | None = None,
    after: str | None = None,
) -> Operation[EscrowPage]:
    """Lists our escrows, page by page; `role` is "buyer" or "provider"."""
    query = {"role": role, "status": status, "limit": limit, "after": after}
    given = {name: value for name, value in query.items() if value is not None}
    return Operation(EscrowPage, "GET", "/api/v1/escrow", query=given)


def redeem(
    journal: bytes, serial: int, items: Sequence[RedeemItem], *, key: str | None = None
) -> Operation[Redeemed]:
    """Presents up to 1000 vouchers with the amounts charged; `serial` is the journal's own."""
    body = {
        "journal": ids.format_id(ids.JOURNAL, journal),
        "serial": serial,
        "items": [item.as_json() for item in items],
    }
    return _move(Redeemed, "/api/v1/redeem", body, key)


def changes(
    since: int, journal: bytes, serial: int, *, limit: int | None = None
) -> Operation[Changes]:
    """Asks which sessions of a journal changed after the cursor `since`."""
    query: dict[str, str | int] = {
        "since": since,
        "journal": ids.format_id(ids.JOURNAL, journal),
        "serial": serial,
    }
    if limit is not None:
        query["limit"] = limit
    return Operation(Changes, "GET", "/api/v1/changes", query=query)

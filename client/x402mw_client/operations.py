"""What can be asked of the escrow, as plain values: operations, listings and steps of several.

Money is given as display units in a text or `Decimal` ("10.00"), or as atomic units in an int, as
answers hold it (`records`); an escrow by its id, as text or 16 bytes, or by its record; keys as raw
bytes, times as whole seconds. What cannot be meant is refused before anything is sent. Here is what
concerns the service and both kinds of escrow; `manual_operations` and `account_operations` have the
rest, and `escrow` carries all of it out.
"""

import secrets
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Generic, TypeAlias, TypeVar

from pydantic import BaseModel

from x402mw.core import ids
from x402mw.core.amounts import Atomic, atomic, display, parse_display, to_atomic
from x402mw.core.errors import LocalError, Malformed
from x402mw.core.strict import b64url_encode
from x402mw_client.records import (
    Changes,
    EscrowKeys,
    EscrowRecord,
    Health,
    Journal,
    Page,
    Redeemed,
    Stats,
)

PAUSES_SECONDS = (0.0, 0.2, 1.0)
"""What is safe to repeat is tried three times, after these pauses."""

TIMEOUT_SECONDS = 10.0
API = "/api/v1"
T = TypeVar("T", bound=BaseModel)
Made = TypeVar("Made")

Money: TypeAlias = str | Decimal | Atomic
"""Display units as a text or `Decimal`, or atomic units as an int; never a float."""

AnyEscrow: TypeAlias = str | bytes | EscrowRecord
"""An escrow by its id (`esc_...` or its 16 bytes) or its record."""

Progress: TypeAlias = Callable[[int], object]
"""Called after each page of a long listing with the number of items so far."""


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
    timeout_seconds: float = TIMEOUT_SECONDS

    @property
    def pauses(self) -> tuple[float, ...]:
        """The seconds to wait before each attempt."""
        return PAUSES_SECONDS if self.repeatable else PAUSES_SECONDS[:1]


@dataclass(frozen=True, slots=True)
class Listing(Generic[T]):
    """All items of a listing, fetched page by page as they are asked for."""

    page: Callable[[str | None], Operation[Page[T]]]
    progress: Progress | None = None


Steps: TypeAlias = Generator[Operation[Any], Any, Made]
"""Several operations, one after the other: yields each, is sent its answer, returns the result."""


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


# How operations are written.


def move(
    answer: type[T], path: str, body: dict[str, Any] | None = None, key: str | None = None
) -> Operation[T]:
    """A POST that changes something: always under an idempotency key, a fresh one if none came."""
    return Operation(answer, "POST", API + path, body, key=key or secrets.token_urlsafe(24))


def given(**members: Any) -> dict[str, Any]:
    """The members that were given at all."""
    return {name: value for name, value in members.items() if value is not None}


def write_amount(amount: Money) -> str:
    """An amount as the API takes it, however fine, or `AmountInvalid`."""
    if isinstance(amount, int):
        return display(atomic(amount))
    text = f"{amount:f}" if isinstance(amount, Decimal) else amount
    parse_display(text)
    return text


def write_whole(amount: Money) -> str:
    """An amount that must be whole atomic units, or `AmountInvalid`."""
    text = write_amount(amount)
    to_atomic(text)
    return text


def write_id(prefix: str, text: str) -> str:
    """An id that goes into a path, or `LocalError`."""
    try:
        return ids.format_id(prefix, ids.parse_id(prefix, text))
    except Malformed as error:
        raise LocalError(str(error)) from None


def name_of(escrow: AnyEscrow) -> str:
    """The id of an escrow as text, or `LocalError`."""
    raw = escrow.session if isinstance(escrow, EscrowRecord) else escrow
    return ids.format_id(ids.ESCROW, raw) if isinstance(raw, bytes) else write_id(ids.ESCROW, raw)


def path_of(escrow: AnyEscrow, action: str = "") -> str:
    """The path of what is done to one escrow."""
    return f"/escrow/{name_of(escrow)}{action}"


# The service itself.


def health() -> Operation[Health]:
    """Asks whether the escrow works."""
    return Operation(Health, "GET", "/health")


def keys() -> Operation[EscrowKeys]:
    """Fetches the escrow's root key and key set."""
    return Operation(EscrowKeys, "GET", "/.well-known/x402mw-keys")


def stats() -> Operation[Stats]:
    """Fetches what anybody may know: fee, minimum, faucet, and figures with one digit."""
    return Operation(Stats, "GET", f"{API}/stats")


# Sessions: escrows that vouchers are redeemed from.


def register_journal(journal: bytes, receipt_key: bytes) -> Operation[Journal]:
    """Registers a provider's journal with the public half of its receipt key."""
    path = f"{API}/journals/{ids.format_id(ids.JOURNAL, journal)}"
    return Operation(Journal, "PUT", path, {"receipt_key": b64url_encode(receipt_key)})


def open_session(
    pay_to: str,
    amount: Money,
    *,
    session_key: bytes,
    journal: bytes,
    expires_in_seconds: int | None = None,
    memo: str | None = None,
    referral_code: str | None = None,
    low_balance: Money | None = None,
    key: str | None = None,
) -> Operation[EscrowRecord]:
    """Locks `amount` for `pay_to`, to be paid by vouchers of `session_key` (the public half)."""
    body = {
        "to_agent_id": pay_to,
        "amount": write_whole(amount),
        "session_key": b64url_encode(session_key),
        "journal": ids.format_id(ids.JOURNAL, journal),
        **given(expires_in_seconds=expires_in_seconds, memo=memo, referral_code=referral_code),
        **given(low_balance=None if low_balance is None else write_whole(low_balance)),
    }
    return move(EscrowRecord, "/escrow", body, key)


def renew_token(escrow: AnyEscrow) -> Operation[EscrowRecord]:
    """Asks for a fresh session token."""
    return Operation(EscrowRecord, "POST", API + path_of(escrow, "/token"))


def redeem(
    journal: bytes, serial: int, items: Sequence[RedeemItem], *, key: str | None = None
) -> Operation[Redeemed]:
    """Presents up to 1000 vouchers with the amounts charged; `serial` is the journal's own."""
    body = {
        "journal": ids.format_id(ids.JOURNAL, journal),
        "serial": serial,
        "items": [item.as_json() for item in items],
    }
    return move(Redeemed, "/redeem", body, key)


def changes(
    since: int, journal: bytes, serial: int, *, limit: int | None = None
) -> Operation[Changes]:
    """Asks which sessions of a journal changed after the cursor `since`."""
    name = ids.format_id(ids.JOURNAL, journal)
    query = given(since=since, journal=name, serial=serial, limit=limit)
    return Operation(Changes, "GET", f"{API}/changes", query=query)


# Escrows of both kinds.


def status(escrow: AnyEscrow) -> Operation[EscrowRecord]:
    """Shows one escrow of ours as it stands now."""
    return Operation(EscrowRecord, "GET", API + path_of(escrow))


def list_escrows(
    *,
    role: str | None = None,
    status: str | None = None,
    limit: int | None = None,
    after: str | None = None,
) -> Operation[Page[EscrowRecord]]:
    """Fetches a page of our escrows, newest first; `role` is "buyer" or "provider"."""
    query = given(role=role, status=status, limit=limit, after=after)
    return Operation(Page[EscrowRecord], "GET", f"{API}/escrow", query=query)


def iter_escrows(
    *,
    role: str | None = None,
    status: str | None = None,
    page_items: int | None = None,
    progress: Progress | None = None,
) -> Listing[EscrowRecord]:
    """Goes through all our escrows, newest first; pages are fetched as they are needed."""
    return Listing(
        lambda after: list_escrows(role=role, status=status, limit=page_items, after=after),
        progress,
    )


def topup(escrow: AnyEscrow, amount: Money, *, key: str | None = None) -> Operation[EscrowRecord]:
    """Adds `amount` to the deposit; for a session the answer carries a fresh token."""
    return move(EscrowRecord, path_of(escrow, "/topup"), {"amount": write_whole(amount)}, key)


def extend(escrow: AnyEscrow, seconds: int, *, key: str | None = None) -> Operation[EscrowRecord]:
    """Ends it so many seconds later; the escrow refuses more than a year from now."""
    return move(EscrowRecord, path_of(escrow, "/extend"), {"seconds": seconds}, key)


def release(
    escrow: AnyEscrow,
    amount: Money | None = None,
    *,
    cumulative: Money | None = None,
    milestone: str | None = None,
    memo: str | None = None,
    key: str | None = None,
) -> Operation[EscrowRecord]:
    """Pays the provider: an amount more, up to a total, a milestone, or all that is free.

    What is finer than a unit is carried until it makes one. A session knows only `cumulative`.
    """
    body = given(
        amount=None if amount is None else write_amount(amount),
        cumulative=None if cumulative is None else write_amount(cumulative),
        milestone=milestone,
        memo=memo,
    )
    return move(EscrowRecord, path_of(escrow, "/release"), body, key)


def close(
    escrow: AnyEscrow,
    *,
    voucher: bytes | None = None,
    amount: Money | None = None,
    key: str | None = None,
) -> Operation[EscrowRecord]:
    """Ends it: what is held goes home.

    A session that its buyer closes ends once its last token can no longer claim; its provider may
    bring the newest voucher (176 bytes) with the total charged, and ends it at once.
    """
    body = given(
        voucher=None if voucher is None else b64url_encode(voucher),
        amount=None if amount is None else write_amount(amount),
    )
    return move(EscrowRecord, path_of(escrow, "/close"), body, key)

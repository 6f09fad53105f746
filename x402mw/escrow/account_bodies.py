"""What request bodies about accounts may hold: agents, keys, transfers, the operator's bookings."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from x402mw.escrow.bodies import (
    HANDLE_FORM,
    AgentId,
    Body,
    Memo,
    Name,
    PositiveAmount,
    ReferralCode,
    text_form,
)
from x402mw.escrow.manual_bodies import Dialect, PositiveWhole

GRACE_SECONDS_MAX = 24 * 60 * 60
RESERVED = frozenset(
    [
        *("admin", "administrator", "arbiter", "escrow", "faucet", "house", "live", "official"),
        *("operator", "operators", "public", "public-test", "root", "security", "support"),
        *("system", "test", "treasury", "world", "x402mw"),
    ]
)
"""Handles that would speak for the escrow or its operator."""

_HANDLE = re.compile(HANDLE_FORM, re.ASCII)

Mode = Literal["live", "test"]
Scope = Literal["read", "spend", "provide", "admin", "arbiter"]


def is_handle(text: str) -> bool:
    """Tells whether a text has the form of a handle; what has not is nobody's."""
    return _HANDLE.fullmatch(text) is not None


def _handle(text: str) -> str:
    if not is_handle(text):
        raise ValueError("a handle has 3 to 40 of a-z, 0-9 and -")
    if text in RESERVED:
        raise ValueError("this handle is reserved")
    return text


Handle = Annotated[str, AfterValidator(_handle), text_form(HANDLE_FORM, "some-bot")]


class NewAgent(Body):
    """`POST /agents`."""

    name: Name
    handle: Handle | None = None
    mode: Mode | None = None
    referral_code: ReferralCode | None = None


class NewKey(Body):
    """`POST /agents/me/keys`: without `scopes`, those of the key that asks."""

    name: Name | Literal[""] = ""
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=5)] | None = None


class Rotation(Body):
    """`POST /agents/me/keys/{key_id}/rotate`: how long the old key still works."""

    grace_seconds: Annotated[int, Field(ge=0, le=GRACE_SECONDS_MAX)] = 0


class NewTransfer(Dialect):
    """`POST /transfers`: pays without an escrow."""

    to_agent_id: AgentId
    amount: PositiveWhole
    memo: Memo = ""


class NewBooking(Body):
    """`POST /operator/deposits` and `/operator/withdrawals`: one line of a bank."""

    agent_id: AgentId
    amount: PositiveAmount
    reference: Name


class NewFees(Body):
    """`POST /operator/fees`: a line of the bank about the operator's own money."""

    amount: PositiveAmount
    reference: Name

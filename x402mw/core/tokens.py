"""What the escrow and the provider sign as JWS: key sets, session tokens and receipts.

* The escrow's **root key** signs only its **key set**, which names its signing keys.
* A signing key signs **session tokens**: proof to a provider that money is locked for it.
* A provider's receipt key signs **receipts**: proof to a buyer of what a session was charged.

No clock here: `exp` is compared by `gate`. Their one form is in `signed`.
`docs/protocol.md`, Tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from x402mw.core import ids
from x402mw.core.amounts import Atomic
from x402mw.core.errors import Malformed, TokenRefused
from x402mw.core.signed import (
    Amount,
    Key,
    Seconds,
    SignedClaims,
    jwk,
    key_id,
    open_signed,
    parse_claims,
    raw_part,
    reads,
    sign,
)
from x402mw.core.strict import b64url_encode, loads_object

TOKEN_TYPE = "x402mw-session+jwt"  # noqa: S105 (a media type, not a secret)
RECEIPT_TYPE = "x402mw-receipt+jwt"
KEYS_TYPE = "x402mw-keys+jwt"

TOKEN_CHARACTERS_MAX = 2048
KEYS_CHARACTERS_MAX = 32 * 1024
TOKEN_SECONDS = 600
CLAIM_SECONDS = 300


@dataclass(frozen=True, slots=True)
class SessionToken:
    """The escrow's word that `deposit` is locked in `session` for `pay_to`, until `exp`.

    Ids are raw bytes, amounts atomic, times whole seconds. `signed_by` is the key id that signed it
    and `retired` tells that this key no longer admits anything new.
    """

    network: str
    session: bytes
    pay_to: str
    journal: bytes
    session_key: bytes
    receipt_key: bytes
    payer: str
    asset: str
    deposit: Atomic
    released: Atomic
    exp: int
    claim_until: int
    signed_by: str = ""
    retired: bool = False


@dataclass(frozen=True, slots=True)
class Receipt:
    """The provider's signed account of a session; the newest proves all before it."""

    network: str
    session: bytes
    pay_to: str
    journal: bytes
    charged: Atomic
    open: Atomic
    issued_at: int
    final: bool


@dataclass(frozen=True, slots=True)
class KeySet:
    """The escrow's signing keys, by key id, and the settings every party must agree on.

    `serial` never falls; after `not_after` (seconds) the set must be fetched again. Keys in
    `retired` still check signatures of old tokens but admit nothing new.
    """

    network: str
    serial: int
    not_after: int
    keys: Mapping[str, bytes]
    retired: frozenset[str]
    min_escrow: Atomic
    claim_seconds: int


def sign_session_token(token: SessionToken, seed: bytes) -> str:
    """Writes and signs a session token with one of the escrow's signing keys."""
    return sign(
        TOKEN_TYPE,
        {
            "iss": token.network,
            "sub": ids.format_id(ids.ESCROW, token.session),
            "aud": token.pay_to,
            "journal": ids.format_id(ids.JOURNAL, token.journal),
            "cnf": {"jwk": jwk(token.session_key)},
            "prv": b64url_encode(token.receipt_key),
            "payer": token.payer,
            "asset": token.asset,
            "deposit": str(token.deposit),
            "released": str(token.released),
            "exp": token.exp,
            "claim_until": token.claim_until,
        },
        seed,
    )


def open_session_token(text: str, keys: KeySet) -> SessionToken:
    """Reads a session token signed by a key of the set.

    Raises `UnknownKey` if a newer key set might know the key, `TokenRefused` for anything else. An
    expired token opens: its time is judged later, so that late retries find their outcome.
    """
    claims, signed_by = open_signed(text, TOKEN_TYPE, keys.keys, TOKEN_CHARACTERS_MAX)
    body = parse_claims(_TokenClaims, claims)
    if body.iss != keys.network:
        raise TokenRefused("the token is of another network")
    return _session_token(body, signed_by, retired=signed_by in keys.retired)


def peek_session_token(text: str) -> SessionToken:
    """Reads a token without checking its signature, as its own holder may."""
    try:
        payload = loads_object(raw_part(text.split(".")[1]))
    except (IndexError, Malformed):
        raise TokenRefused("this is not a token") from None
    return _session_token(parse_claims(_TokenClaims, payload), "", retired=False)


def sign_receipt(receipt: Receipt, seed: bytes) -> str:
    """Writes and signs a receipt with the provider's receipt key."""
    return sign(
        RECEIPT_TYPE,
        {
            "iss": receipt.pay_to,
            "sub": ids.format_id(ids.ESCROW, receipt.session),
            "network": receipt.network,
            "journal": ids.format_id(ids.JOURNAL, receipt.journal),
            "charged": str(receipt.charged),
            "open": str(receipt.open),
            "iat": receipt.issued_at,
            "final": receipt.final,
        },
        seed,
    )


def open_receipt(text: str, receipt_key: bytes) -> Receipt:
    """Reads a receipt signed by `receipt_key` (the token's `prv`), or raises `TokenRefused`."""
    claims, _ = open_signed(
        text, RECEIPT_TYPE, {key_id(receipt_key): receipt_key}, TOKEN_CHARACTERS_MAX
    )
    body = parse_claims(_ReceiptClaims, claims)
    return Receipt(
        network=body.network,
        session=body.sub,
        pay_to=body.iss,
        journal=body.journal,
        charged=body.charged,
        open=body.open,
        issued_at=body.iat,
        final=body.final,
    )


def sign_key_set(key_set: KeySet, root_seed: bytes) -> str:
    """Writes and signs a key set with the escrow's root key."""
    keys = [
        {**jwk(key), "kid": name, "retired": name in key_set.retired}
        for name, key in key_set.keys.items()
    ]
    return sign(
        KEYS_TYPE,
        {
            "network": key_set.network,
            "serial": key_set.serial,
            "not_after": key_set.not_after,
            "keys": keys,
            "min_escrow": str(key_set.min_escrow),
            "S": key_set.claim_seconds,
        },
        root_seed,
    )


def open_key_set(text: str, root_key: bytes) -> KeySet:
    """Reads a key set signed by the pinned root key, or raises `TokenRefused`.

    The caller compares `serial` with the highest it knows, and `not_after` with its clock.
    """
    claims, _ = open_signed(text, KEYS_TYPE, {key_id(root_key): root_key}, KEYS_CHARACTERS_MAX)
    body = parse_claims(_KeySetClaims, claims)
    if any(key_id(key.x) != key.kid for key in body.keys):
        raise TokenRefused("a key in the key set has another key's id")
    return KeySet(
        network=body.network,
        serial=body.serial,
        not_after=body.not_after,
        keys={key.kid: key.x for key in body.keys},
        retired=frozenset(key.kid for key in body.keys if key.retired),
        min_escrow=body.min_escrow,
        claim_seconds=body.S,
    )


# The claims, as they are read.


SessionId = Annotated[bytes, reads(lambda text: ids.parse_id(ids.ESCROW, text))]
JournalId = Annotated[bytes, reads(lambda text: ids.parse_id(ids.JOURNAL, text))]


class _Jwk(SignedClaims):
    kty: Literal["OKP"]
    crv: Literal["Ed25519"]
    x: Key


class _Confirmation(SignedClaims):
    jwk: _Jwk


class _TokenClaims(SignedClaims):
    iss: str
    sub: SessionId
    aud: str
    journal: JournalId
    cnf: _Confirmation
    prv: Key
    payer: str
    asset: str
    deposit: Amount
    released: Amount
    exp: Seconds
    claim_until: Seconds


def _session_token(body: _TokenClaims, signed_by: str, *, retired: bool) -> SessionToken:
    return SessionToken(
        network=body.iss,
        session=body.sub,
        pay_to=body.aud,
        journal=body.journal,
        session_key=body.cnf.jwk.x,
        receipt_key=body.prv,
        payer=body.payer,
        asset=body.asset,
        deposit=body.deposit,
        released=body.released,
        exp=body.exp,
        claim_until=body.claim_until,
        signed_by=signed_by,
        retired=retired,
    )


class _ReceiptClaims(SignedClaims):
    iss: str
    sub: SessionId
    network: str
    journal: JournalId
    charged: Amount
    open: Amount
    iat: Seconds
    final: bool


class _NamedKey(_Jwk):
    kid: str
    retired: bool = False


class _KeySetClaims(SignedClaims):
    network: str
    serial: Seconds
    not_after: Seconds
    keys: Annotated[list[_NamedKey], Field(min_length=1, max_length=32)]
    min_escrow: Amount
    S: Annotated[int, Field(ge=60, le=86_400)]

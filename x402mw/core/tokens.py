"""What the escrow and the provider sign as JWS: key sets, session tokens and receipts.

* The escrow's **root key** signs only its **key set**, which names its signing keys.
* A signing key signs **session tokens**: proof to a provider that money is locked for it.
* A provider's receipt key signs **receipts**: proof to a buyer of what a session was charged.

joserfc makes and checks the signatures, after our own check that the header is exactly the one
expected and that every key is a proper point. No clock here: `exp` is compared by `gate`.
`docs/protocol.md`, Tokens.
"""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import OKPKey
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from x402mw.core import ids
from x402mw.core.amounts import Atomic, parse_atomic
from x402mw.core.errors import KeyRefused, Malformed, TokenRefused, UnknownKey, X402mwError
from x402mw.core.keys import PUBLIC_KEY_BYTES, check_public_key, public_key
from x402mw.core.strict import b64url_decode, b64url_encode, dumps, loads_object

ALGORITHM = "Ed25519"
TOKEN_TYPE = "x402mw-session+jwt"  # noqa: S105 (a media type, not a secret)
RECEIPT_TYPE = "x402mw-receipt+jwt"
KEYS_TYPE = "x402mw-keys+jwt"

TOKEN_CHARACTERS_MAX = 2048
KEYS_CHARACTERS_MAX = 32 * 1024
TOKEN_SECONDS = 600
CLAIM_SECONDS = 300

_REGISTRY = jws.JWSRegistry(algorithms=[ALGORITHM])


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


def key_id(key: bytes) -> str:
    """The RFC 7638 thumbprint of an Ed25519 public key."""
    members = f'{{"crv":"Ed25519","kty":"OKP","x":"{b64url_encode(key)}"}}'
    return b64url_encode(hashlib.sha256(members.encode()).digest())


def sign_session_token(token: SessionToken, seed: bytes) -> str:
    """Writes and signs a session token with one of the escrow's signing keys."""
    return _sign(
        TOKEN_TYPE,
        {
            "iss": token.network,
            "sub": ids.format_id(ids.ESCROW, token.session),
            "aud": token.pay_to,
            "journal": ids.format_id(ids.JOURNAL, token.journal),
            "cnf": {"jwk": _jwk(token.session_key)},
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
    claims, signed_by = _open(text, TOKEN_TYPE, keys.keys, TOKEN_CHARACTERS_MAX)
    body = _parse(_TokenClaims, claims)
    if body.iss != keys.network:
        raise TokenRefused("the token is of another network")
    return _session_token(body, signed_by, retired=signed_by in keys.retired)


def peek_session_token(text: str) -> SessionToken:
    """Reads a token without checking its signature, as its own holder may."""
    try:
        payload = loads_object(_raw_part(text.split(".")[1]))
    except (IndexError, Malformed):
        raise TokenRefused("this is not a token") from None
    return _session_token(_parse(_TokenClaims, payload), "", retired=False)


def sign_receipt(receipt: Receipt, seed: bytes) -> str:
    """Writes and signs a receipt with the provider's receipt key."""
    return _sign(
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
    claims, _ = _open(text, RECEIPT_TYPE, {key_id(receipt_key): receipt_key}, TOKEN_CHARACTERS_MAX)
    body = _parse(_ReceiptClaims, claims)
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
        {**_jwk(key), "kid": name, "retired": name in key_set.retired}
        for name, key in key_set.keys.items()
    ]
    return _sign(
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
    claims, _ = _open(text, KEYS_TYPE, {key_id(root_key): root_key}, KEYS_CHARACTERS_MAX)
    body = _parse(_KeySetClaims, claims)
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


# The JWS form, one for all three.


def _sign(typ: str, claims: dict[str, Any], seed: bytes) -> str:
    public = public_key(seed)
    header = {"alg": ALGORITHM, "typ": typ, "kid": key_id(public)}
    key = OKPKey.import_key({**_jwk(public), "d": b64url_encode(seed)})
    return jws.serialize_compact(header, dumps(claims), key, registry=_REGISTRY)


def _open(
    text: str, typ: str, keys: Mapping[str, bytes], characters_max: int
) -> tuple[dict[str, Any], str]:
    """Checks size, header, key and signature, in that order; returns the claims and the key id."""
    if len(text) > characters_max or not text.isascii() or text.count(".") != 2:
        raise TokenRefused(f"this is not a compact JWS of at most {characters_max} characters")
    header, payload, signature = text.split(".")
    kid = _check_header(header, typ)
    if kid not in keys:
        raise UnknownKey("the token is signed by a key that is not in the key set")
    try:
        check_public_key(keys[kid])
        # One token has one spelling: base64url leaves spare bits, so both are read back.
        claims = _raw_part(payload)
        _raw_part(signature)
        jws.deserialize_compact(text, OKPKey.import_key(_jwk(keys[kid])), registry=_REGISTRY)
    except (JoseError, ValueError, KeyRefused, Malformed):
        raise TokenRefused("the token's signature does not verify") from None
    try:
        return loads_object(claims), kid
    except Malformed as error:
        raise TokenRefused(f"the token's claims are malformed: {error}") from None


def _check_header(part: str, typ: str) -> str:
    """Returns the key id of a header that is exactly {alg, typ, kid} with the expected values."""
    try:
        header = loads_object(_raw_part(part))
    except Malformed:
        raise TokenRefused("the token's header is malformed") from None
    kid = header.get("kid")
    if header != {"alg": ALGORITHM, "typ": typ, "kid": kid} or not isinstance(kid, str):
        raise TokenRefused(f"the token's header must be alg {ALGORITHM}, typ {typ} and a kid")
    return kid


def _raw_part(part: str) -> bytes:
    try:
        raw = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
    except ValueError:
        raise Malformed("not base64url") from None
    if b64url_encode(raw) != part:
        raise Malformed("not canonical base64url")
    return raw


def _jwk(key: bytes) -> dict[str, str | list[str]]:
    return {"kty": "OKP", "crv": "Ed25519", "x": b64url_encode(key)}


# The claims, as they are read.


Claims = TypeVar("Claims", bound=BaseModel)


def _parse(model: type[Claims], claims: dict[str, Any]) -> Claims:
    try:
        return model.model_validate(claims)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise TokenRefused(f"the token's claim {where} is missing or malformed") from None


def _reads(reader: Any) -> BeforeValidator:
    def read(value: object) -> Any:
        if not isinstance(value, str):
            raise ValueError("a string belongs here")  # noqa: TRY004 (pydantic wants ValueError)
        try:
            return reader(value)
        except X402mwError as error:
            raise ValueError(str(error)) from None

    return BeforeValidator(read)


Key = Annotated[bytes, _reads(lambda text: check_public_key(b64url_decode(text, PUBLIC_KEY_BYTES)))]
SessionId = Annotated[bytes, _reads(lambda text: ids.parse_id(ids.ESCROW, text))]
JournalId = Annotated[bytes, _reads(lambda text: ids.parse_id(ids.JOURNAL, text))]
Amount = Annotated[Atomic, _reads(parse_atomic)]
Seconds = Annotated[int, Field(ge=0, lt=2**53)]


class _Claims(BaseModel):
    # Claims we do not know are ignored: the signer is trusted, and may learn new words first.
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class _Jwk(_Claims):
    kty: Literal["OKP"]
    crv: Literal["Ed25519"]
    x: Key


class _Confirmation(_Claims):
    jwk: _Jwk


class _TokenClaims(_Claims):
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


class _ReceiptClaims(_Claims):
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


class _KeySetClaims(_Claims):
    network: str
    serial: Seconds
    not_after: Seconds
    keys: Annotated[list[_NamedKey], Field(min_length=1, max_length=32)]
    min_escrow: Amount
    S: Annotated[int, Field(ge=60, le=86_400)]

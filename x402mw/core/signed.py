"""The one JWS form of all that the escrow and the provider sign.

joserfc makes and checks the signatures, after our own check that the header is exactly the one
expected and that every key is a proper point.
"""

import base64
import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import OKPKey
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from x402mw.core.amounts import Atomic, parse_atomic
from x402mw.core.errors import KeyRefused, Malformed, TokenRefused, UnknownKey, X402mwError
from x402mw.core.keys import PUBLIC_KEY_BYTES, check_public_key, public_key
from x402mw.core.strict import b64url_decode, b64url_encode, dumps, loads_object

ALGORITHM = "Ed25519"
_REGISTRY = jws.JWSRegistry(algorithms=[ALGORITHM])


def key_id(key: bytes) -> str:
    """The RFC 7638 thumbprint of an Ed25519 public key."""
    members = f'{{"crv":"Ed25519","kty":"OKP","x":"{b64url_encode(key)}"}}'
    return b64url_encode(hashlib.sha256(members.encode()).digest())


def sign(typ: str, claims: dict[str, Any], seed: bytes) -> str:
    """Writes and signs claims of one type."""
    public = public_key(seed)
    header = {"alg": ALGORITHM, "typ": typ, "kid": key_id(public)}
    key = OKPKey.import_key({**jwk(public), "d": b64url_encode(seed)})
    return jws.serialize_compact(header, dumps(claims), key, registry=_REGISTRY)


def open_signed(
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
        claims = raw_part(payload)
        raw_part(signature)
        jws.deserialize_compact(text, OKPKey.import_key(jwk(keys[kid])), registry=_REGISTRY)
    except (JoseError, ValueError, KeyRefused, Malformed):
        raise TokenRefused("the token's signature does not verify") from None
    try:
        return loads_object(claims), kid
    except Malformed as error:
        raise TokenRefused(f"the token's claims are malformed: {error}") from None


def _check_header(part: str, typ: str) -> str:
    """Returns the key id of a header that is exactly {alg, typ, kid} with the expected values."""
    try:
        header = loads_object(raw_part(part))
    except Malformed:
        raise TokenRefused("the token's header is malformed") from None
    kid = header.get("kid")
    if header != {"alg": ALGORITHM, "typ": typ, "kid": kid} or not isinstance(kid, str):
        raise TokenRefused(f"the token's header must be alg {ALGORITHM}, typ {typ} and a kid")
    return kid


def raw_part(part: str) -> bytes:
    """Decodes a part of a JWS that has its one spelling."""
    try:
        raw = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
    except ValueError:
        raise Malformed("not base64url") from None
    if b64url_encode(raw) != part:
        raise Malformed("not canonical base64url")
    return raw


def jwk(key: bytes) -> dict[str, str | list[str]]:
    """Writes a public key as JSON."""
    return {"kty": "OKP", "crv": "Ed25519", "x": b64url_encode(key)}


Claims = TypeVar("Claims", bound=BaseModel)


def parse_claims(model: type[Claims], claims: dict[str, Any]) -> Claims:
    """Reads claims as a model has them."""
    try:
        return model.model_validate(claims)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise TokenRefused(f"the token's claim {where} is missing or malformed") from None


def reads(reader: Any) -> BeforeValidator:
    """A field that is a string and reads as something else."""

    def read(value: object) -> Any:
        if not isinstance(value, str):
            raise ValueError("a string belongs here")  # noqa: TRY004 (pydantic wants ValueError)
        try:
            return reader(value)
        except X402mwError as error:
            raise ValueError(str(error)) from None

    return BeforeValidator(read)


Key = Annotated[bytes, reads(lambda text: check_public_key(b64url_decode(text, PUBLIC_KEY_BYTES)))]
Amount = Annotated[Atomic, reads(parse_atomic)]
Seconds = Annotated[int, Field(ge=0, lt=2**53)]


class SignedClaims(BaseModel):
    """What was signed, as it is read."""

    # Claims we do not know are ignored: the signer is trusted, and may learn new words first.
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

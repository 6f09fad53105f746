"""Tokens, receipts and key sets: signed by the right key, of the right kind, in one spelling."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from joserfc import jws
from joserfc.jwk import OKPKey

from tests.core.test_keys import LOW_ORDER, NOT_CANONICAL
from tests.support import payments as world
from x402mw.core import tokens
from x402mw.core.amounts import Atomic
from x402mw.core.errors import TokenRefused, UnknownKey
from x402mw.core.keys import public_key
from x402mw.core.signed import jwk, key_id, raw_part
from x402mw.core.strict import b64url_encode, dumps, loads_object

TEXT = tokens.sign_session_token(world.TOKEN, world.SIGNER)
RECEIPT = tokens.Receipt(
    network=world.NETWORK,
    session=world.SESSION,
    pay_to=world.PAY_TO,
    journal=world.JOURNAL,
    charged=Atomic(1000),
    open=Atomic(0),
    issued_at=world.NOW,
    final=True,
)
RECEIPT_TEXT = tokens.sign_receipt(RECEIPT, world.RECEIPTS)
KEYS_TEXT = tokens.sign_key_set(world.KEY_SET, world.ROOT)


def claims_of(text: str) -> dict[str, Any]:
    """The claims of a token, unchecked."""
    part = text.split(".")[1]
    return loads_object(raw_part(part))


def forge(claims: object, header: dict[str, Any] | None = None, seed: bytes = world.SIGNER) -> str:
    """A token whose signature is right and whose content is anything."""
    public = public_key(seed)
    usual = {"alg": "Ed25519", "typ": tokens.TOKEN_TYPE, "kid": key_id(public)}
    key = OKPKey.import_key({**jwk(public), "d": b64url_encode(seed)})
    raw = claims if isinstance(claims, bytes) else dumps(claims)
    registry = jws.JWSRegistry(algorithms=["Ed25519", "EdDSA"], strict_check_header=False)
    return jws.serialize_compact(usual if header is None else header, raw, key, registry=registry)


def test_a_token_reads_back() -> None:
    """What the escrow signs is what a provider reads, with the key that signed it."""
    kid = key_id(world.SIGNER_KEY)
    assert tokens.open_session_token(TEXT, world.KEY_SET) == replace(world.TOKEN, signed_by=kid)
    assert tokens.peek_session_token(TEXT) == world.TOKEN
    assert len(TEXT) < tokens.TOKEN_CHARACTERS_MAX / 2


def test_a_retired_key_still_checks_and_says_so() -> None:
    """Old tokens open, so that late retries find their outcome, and are marked retired."""
    retired = replace(world.KEY_SET, retired=frozenset(world.KEY_SET.keys))
    assert tokens.open_session_token(TEXT, retired).retired


def test_a_key_nobody_knows_is_told_apart() -> None:
    """A token by an unknown key may become readable with a fresh key set."""
    with pytest.raises(UnknownKey):
        tokens.open_session_token(TEXT, replace(world.KEY_SET, keys={}))


def test_a_token_of_another_network_is_refused() -> None:
    """A signing key that serves two networks does not mix them."""
    with pytest.raises(TokenRefused, match="network"):
        tokens.open_session_token(TEXT, replace(world.KEY_SET, network="escrow:other"))


@given(st.data())
def test_a_damaged_token_is_refused(data: st.DataObject) -> None:
    """No character can change, spare bits of base64url included."""
    place = data.draw(st.integers(0, len(TEXT) - 1))
    letter = data.draw(st.sampled_from("ABCDwxyz0189-_.=+ é\n"))
    changed = TEXT[:place] + letter + TEXT[place + 1 :]
    if changed != TEXT:
        with pytest.raises(TokenRefused):
            tokens.open_session_token(changed, world.KEY_SET)


@given(st.text(max_size=40) | st.from_regex(r"[\w-]*\.[\w-]*\.[\w-]*", fullmatch=True))
def test_any_text_is_refused_by_type(text: str) -> None:
    """No text raises anything but `TokenRefused`, however it is read."""
    for read in (
        lambda: tokens.open_session_token(text, world.KEY_SET),
        lambda: tokens.peek_session_token(text),
        lambda: tokens.open_receipt(text, world.RECEIPT_KEY),
        lambda: tokens.open_key_set(text, world.ROOT_KEY),
    ):
        with pytest.raises(TokenRefused):
            read()


def test_the_last_characters_have_one_spelling() -> None:
    """The spare bits at the end of each part are zero."""
    for part in range(3):
        parts = TEXT.split(".")
        for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_":
            changed = [*parts]
            changed[part] = parts[part][:-1] + letter
            if changed != parts:
                with pytest.raises(TokenRefused):
                    tokens.open_session_token(".".join(changed), world.KEY_SET)


@pytest.mark.parametrize(
    "change",
    [
        {"alg": "EdDSA"},
        {"typ": tokens.RECEIPT_TYPE},
        {"typ": "JWT"},
        {"crit": ["exp"]},
        {"b64": True},
        {"jku": "https://keys.example.com"},
        {"jwk": jwk(world.BUYER_KEY)},
    ],
)
def test_only_the_exact_header_passes(change: dict[str, Any]) -> None:
    """Another algorithm, another kind of message or one more field is refused."""
    usual = {
        "alg": "Ed25519",
        "typ": tokens.TOKEN_TYPE,
        "kid": key_id(world.SIGNER_KEY),
    }
    part = b64url_encode(dumps(usual | change))
    with pytest.raises(TokenRefused, match="header"):
        tokens.open_session_token(f"{part}.{TEXT.split('.', 1)[1]}", world.KEY_SET)


@pytest.mark.parametrize("kid", [None, 1, [], {}])
def test_a_kid_is_a_text(kid: object) -> None:
    """A key id of another type is refused before any look-up."""
    part = b64url_encode(dumps({"alg": "Ed25519", "typ": tokens.TOKEN_TYPE, "kid": kid}))
    with pytest.raises(TokenRefused, match="header"):
        tokens.open_session_token(f"{part}.e30.AA", world.KEY_SET)


def test_one_kind_is_never_read_as_another() -> None:
    """Token, receipt and key set are told apart even under one and the same key."""
    keyset = replace(world.KEY_SET, keys={key_id(world.RECEIPT_KEY): world.RECEIPT_KEY})
    with pytest.raises(TokenRefused, match="typ"):
        tokens.open_session_token(RECEIPT_TEXT, keyset)
    with pytest.raises(TokenRefused, match="typ"):
        tokens.open_receipt(tokens.sign_session_token(world.TOKEN, world.RECEIPTS),
                            world.RECEIPT_KEY)  # fmt: skip
    with pytest.raises(TokenRefused, match="typ"):
        tokens.open_key_set(tokens.sign_session_token(world.TOKEN, world.ROOT), world.ROOT_KEY)


@pytest.mark.parametrize("name", list(claims_of(TEXT)))
@pytest.mark.parametrize("value", [None, True, [], {}, "junk\x00", -1, 2**64, "@absent"])
def test_junk_claims_are_refused(name: str, value: object) -> None:
    """Even a rightly signed token is read strictly, each claim by its type."""
    claims = claims_of(TEXT) | {name: value}
    if value == "@absent":
        del claims[name]
    elif value == "junk\x00" and name in ("aud", "payer", "asset"):
        pytest.skip("any text is a party's name; the gate compares it")
    with pytest.raises(TokenRefused):
        tokens.open_session_token(forge(claims), world.KEY_SET)


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b'{"a":1,"a":2}', b"\xff"])
def test_malformed_claims_are_refused(raw: bytes) -> None:
    """Signed bytes that are no strict JSON object are refused."""
    with pytest.raises(TokenRefused):
        tokens.open_session_token(forge(raw), world.KEY_SET)


@pytest.mark.parametrize("text", LOW_ORDER + NOT_CANONICAL)
def test_weak_keys_in_a_token_are_refused(text: str) -> None:
    """A token cannot bring in a key that anybody could sign for."""
    weak = b64url_encode(bytes.fromhex(text))
    claims = claims_of(TEXT)
    for change in ({"prv": weak}, {"cnf": {"jwk": claims["cnf"]["jwk"] | {"x": weak}}}):
        with pytest.raises(TokenRefused):
            tokens.open_session_token(forge(claims | change), world.KEY_SET)


def test_a_weak_signing_key_is_refused() -> None:
    """A key set that was built with a weak key verifies nothing."""
    weak = bytes.fromhex(LOW_ORDER[0])
    keyset = replace(world.KEY_SET, keys={key_id(world.SIGNER_KEY): weak})
    with pytest.raises(TokenRefused, match="signature"):
        tokens.open_session_token(TEXT, keyset)


def test_a_long_token_is_not_parsed() -> None:
    """A token above 2,048 characters is refused for its length."""
    with pytest.raises(TokenRefused, match="2048"):
        tokens.open_session_token(TEXT + "A" * 2048, world.KEY_SET)


def test_a_receipt_reads_back() -> None:
    """A buyer reads what the provider signed, under the key its token named."""
    assert tokens.open_receipt(RECEIPT_TEXT, world.RECEIPT_KEY) == RECEIPT
    with pytest.raises(UnknownKey):
        tokens.open_receipt(RECEIPT_TEXT, world.BUYER_KEY)


def test_a_key_set_reads_back() -> None:
    """The key set is believed under the pinned root only."""
    retired = replace(world.KEY_SET, retired=frozenset(world.KEY_SET.keys))
    assert tokens.open_key_set(KEYS_TEXT, world.ROOT_KEY) == world.KEY_SET
    assert tokens.open_key_set(tokens.sign_key_set(retired, world.ROOT), world.ROOT_KEY) == retired
    with pytest.raises(TokenRefused):
        tokens.open_key_set(KEYS_TEXT, world.SIGNER_KEY)


def test_a_key_under_another_id_is_refused() -> None:
    """A key id is the thumbprint of its key, so no key can take another's place."""
    swapped = replace(world.KEY_SET, keys={key_id(world.BUYER_KEY): world.SIGNER_KEY})
    with pytest.raises(TokenRefused, match="another key's id"):
        tokens.open_key_set(tokens.sign_key_set(swapped, world.ROOT), world.ROOT_KEY)

"""The decoders under fuzz, and what must hold for every input: not only "no crash".

Each `check_*` takes any bytes. What is refused is refused by a typed error; what is accepted is in
range, reads back the same, and has no second spelling; other implementations agree where they are.
"""

import contextlib
from decimal import Decimal
from fractions import Fraction
from typing import Any

import httpx
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from starlette.routing import compile_path
from x402.http import utils as official

from tests.support import payments
from tests.support.payments import BUYER_KEY, RECEIPT_KEY, ROOT_KEY, SIGNER_KEY
from x402mw.core import (
    amounts,
    gate,
    headers,
    ids,
    keys,
    messages,
    routes,
    signed,
    strict,
    tokens,
    vouchers,
)
from x402mw.core.amounts import AMOUNT_MAX
from x402mw.core.errors import (
    AmountInvalid,
    ConfigurationError,
    KeyRefused,
    Malformed,
    TokenRefused,
    UnknownKey,
)
from x402mw.core.terms import Terms, read_terms, write_requirements
from x402mw_client import answers, offers

STATUSES = {400, 402, 409, 503}
REASONS = {"payment_header", "malformed", "constants", "amount", "binding", "unknown_key", "token"}
REASONS |= {"control_terms", "signature", "journal_replaced"}


def text_of(data: bytes) -> str:
    """The text that a server would hand on for these bytes."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _in_range(*numbers: int | None) -> bool:
    return all(number is None or 0 <= number <= AMOUNT_MAX for number in numbers)


def _openssl_agrees(key: bytes, message: bytes, signature: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except InvalidSignature:
        return False
    return True


# Headers.


def _decode(model: Any, data: bytes, bytes_max: int) -> Any:
    """Decodes a header; what decodes is canonical base64 and survives a round trip."""
    try:
        found = headers.decode_header(model, data, bytes_max)
    except Malformed:
        return None
    assert len(data) <= bytes_max
    assert strict.b64_encode(strict.b64_decode(data)).encode() == data
    again = headers.encode_header(found).encode()
    if len(again) <= bytes_max:
        # Compared as JSON: a number with a point is written as a text.
        second = headers.decode_header(model, again, bytes_max)
        assert strict.same(messages.as_json(second), messages.as_json(found))
    return found


def check_header(data: bytes) -> None:
    """The payment header by itself; the official models read what we would send."""
    found = _decode(messages.PaymentPayload, data, headers.SIGNATURE_BYTES_MAX)
    if found is None:
        return
    inner = found.payload
    assert len(inner.voucher) == vouchers.WIRE_CHARACTERS
    assert _in_range(inner.expires)
    assert 0 <= inner.binding <= 255
    try:
        messages.validate(messages.PaymentRequirements, found.accepted)
    except Malformed:
        return
    official.decode_payment_signature_header(headers.encode_header(found))


def check_inspect(data: bytes) -> None:
    """The payment header through the whole gate, up to the signature."""
    for control in (False, True):
        try:
            claim = gate.inspect([data], payments.BOOK, payments.open_token, control=control)
        except gate.Refused as refusal:
            assert refusal.status in STATUSES, refusal.status
            assert refusal.reason in REASONS, refusal.reason
            continue
        assert claim.terms.amount > 0 or control
        assert _in_range(claim.seq, claim.expires, claim.signed.voucher.cumulative)
        assert claim.binding <= min(claim.terms.binding, 1)
        assert claim.token.session == claim.session
        assert claim.terms.network_id == payments.NETWORK_ID == claim.signed.voucher.network
        signature = (claim.token.session_key, claim.signed.raw, claim.signed.signature)
        assert _openssl_agrees(*signature)


def check_required(data: bytes) -> None:
    """The buyer's reading of a 402: every offer is sound terms, or is passed over."""
    answer = _answer(402, headers.PAYMENT_REQUIRED, data)
    found = _decode(messages.PaymentRequired, data, headers.REQUIRED_BYTES_MAX)
    accepts = offers.read_accepts(answer)
    # httpx strips blanks around a value, so that it may read one that the decoder refuses.
    assert found is None or accepts == found.accepts
    for entry in accepts:
        offers.names_escrow(entry, frozenset({"https://escrow.example.com"}))
        try:
            offer = offers.read_offer(entry, payments.NETWORK, payments.NETWORK_ID)
        except Malformed:
            continue
        _check_terms(offer.terms)
        offers.covers(offer, "GET", "/quote/BTC")


def check_response(data: bytes) -> None:
    """The buyer's reading of a settlement: a word of known meaning, or none."""
    found = _decode(messages.SettlementResponse, data, headers.RESPONSE_BYTES_MAX)
    if found is not None:
        official.decode_payment_response_header(headers.encode_header(found))
    for status in (200, 402, 409, 410, 429, 503):
        answer = _answer(status, headers.PAYMENT_RESPONSE, data)
        word = answers.read_word(answer, 7)
        assert isinstance(answers.classify(answer, word), answers.Verdict)
        if word is not None:
            assert _in_range(word.charge, word.charged_total, word.open_total)


def _answer(status: int, name: str, value: bytes) -> httpx.Response:
    return httpx.Response(status, headers=[(name.encode(), value)])


# Terms.


def check_terms(data: bytes) -> None:
    """One entry of `accepts`: it means exactly its terms, and hashes to what it names."""
    try:
        requirements = messages.parse(messages.PaymentRequirements, data)
        extra = messages.validate(messages.EscrowExtra, requirements.extra)
        terms = read_terms(requirements, extra, payments.NETWORK_ID)
    except Malformed:
        return
    assert terms.id.hex() == extra.terms
    _check_terms(terms)


def _check_terms(terms: Terms) -> None:
    assert _in_range(terms.amount, terms.unit_price, terms.per, terms.base)
    assert terms.base <= terms.amount or not terms.metered
    assert terms.control.startswith("/")
    assert not terms.control.startswith(("//", "/\\"))
    assert routes.parse_route(f"{terms.method} {terms.route}") == (terms.method, terms.route)
    written = write_requirements(terms, escrow="https://e", suggested_deposit=amounts.ZERO)
    requirements = messages.validate(messages.PaymentRequirements, written)
    extra = messages.validate(messages.EscrowExtra, requirements.extra)
    assert read_terms(requirements, extra, terms.network_id) == terms


# Vouchers.


def check_voucher(data: bytes) -> None:
    """The wire form of a voucher: one spelling, numbers in range, one verdict on its signature."""
    _check_prefix(data)
    with contextlib.suppress(Malformed):
        assert len(data) == len(vouchers.split_voucher(data).raw) + keys.SIGNATURE_BYTES
    text = text_of(data)
    try:
        signed = vouchers.parse_voucher(text)
    except Malformed:
        return
    voucher = signed.voucher
    assert signed.wire == text
    assert _in_range(voucher.seq, voucher.cumulative)
    assert len(signed.commitment_id) == 64
    assert vouchers.split_voucher(signed.raw + signed.signature) == signed
    secret = keys.secret_key(payments.BUYER)
    assert vouchers.sign_voucher(voucher, secret).raw == signed.raw
    ours = vouchers.verify_voucher(signed, BUYER_KEY)
    assert not ours or _openssl_agrees(BUYER_KEY, signed.raw, signed.signature)
    assert ids.parse_id(ids.ESCROW, ids.format_id(ids.ESCROW, voucher.session)) == voucher.session


def _check_prefix(data: bytes) -> None:
    """A text in a signed message stands behind its own length, or is refused."""
    text = data.decode("utf-8", "surrogateescape")
    with contextlib.suppress(Malformed):
        assert vouchers.lp(8, text) == bytes([len(data)]) + data


# What is signed as JWS.


def _check_signature(text: str, key: bytes) -> None:
    """What joserfc accepted, libsodium accepts too, over the very same characters."""
    said, _, signature = text.rpartition(".")
    raw = signed.raw_part(signature)
    assert keys.verify(key, said.encode(), raw)
    assert strict.b64url_encode(raw) == signature


def check_token(data: bytes) -> None:
    """A session token as a provider opens it and as its holder peeks at it."""
    text = text_of(data)
    peeked = None
    with contextlib.suppress(TokenRefused):
        peeked = tokens.peek_session_token(text)
    try:
        token = tokens.open_session_token(text, payments.KEY_SET)
    except UnknownKey:
        return
    except TokenRefused as error:
        assert error.code == "token"
        return
    _check_signature(text, SIGNER_KEY)
    assert peeked is not None
    assert (peeked.session, peeked.deposit, peeked.exp) == (token.session, token.deposit, token.exp)
    assert _in_range(token.deposit, token.released, token.exp, token.claim_until)
    assert len(token.session) == len(token.journal) == 16
    for key in (token.session_key, token.receipt_key):
        assert keys.check_public_key(key) == key
    again = tokens.sign_session_token(token, payments.SIGNER)
    if len(again) <= tokens.TOKEN_CHARACTERS_MAX:
        assert tokens.open_session_token(again, payments.KEY_SET) == token


def check_receipt(data: bytes) -> None:
    """A receipt as a buyer opens it."""
    text = text_of(data)
    try:
        receipt = tokens.open_receipt(text, RECEIPT_KEY)
    except TokenRefused:
        return
    _check_signature(text, RECEIPT_KEY)
    assert _in_range(receipt.charged, receipt.open, receipt.issued_at)
    again = tokens.sign_receipt(receipt, payments.RECEIPTS)
    if len(again) <= tokens.TOKEN_CHARACTERS_MAX:
        assert tokens.open_receipt(again, RECEIPT_KEY) == receipt


def check_key_set(data: bytes) -> None:
    """A key set as everybody opens it; its keys are points, under their own names."""
    text = text_of(data)
    try:
        found = tokens.open_key_set(text, ROOT_KEY)
    except TokenRefused:
        return
    _check_signature(text, ROOT_KEY)
    assert 1 <= len(found.keys) <= 32
    assert all(tokens.key_id(key) == name for name, key in found.keys.items())
    assert all(keys.check_public_key(key) for key in found.keys.values())
    assert found.retired <= found.keys.keys()
    assert _in_range(found.serial, found.not_after, found.min_escrow)
    again = tokens.sign_key_set(found, payments.ROOT)
    assert tokens.open_key_set(again, ROOT_KEY) == found


# Small texts.


def check_amount(data: bytes) -> None:
    """An amount in either text: exactly what a big decimal says, or refused."""
    text = text_of(data)
    for asset in (amounts.USDC, amounts.Asset("X", 0), amounts.Asset("Y", 18)):
        _check_display(text, asset)
    try:
        atomic = amounts.parse_atomic(text)
    except AmountInvalid:
        return
    assert str(atomic) == text
    assert _in_range(atomic)
    assert atomic > 2**62 or amounts.to_atomic(amounts.display(atomic)) == atomic


def _check_display(text: str, asset: amounts.Asset) -> None:
    try:
        floor = amounts.to_atomic_floor(text, asset)
    except AmountInvalid:
        return
    exact = Fraction(Decimal(text)) * asset.unit
    assert floor <= exact < floor + 1
    assert _in_range(floor)
    assert Fraction(amounts.display(floor, asset)) * asset.unit == floor
    try:
        whole = amounts.to_atomic(text, asset)
    except AmountInvalid:
        assert exact.denominator != 1
    else:
        assert whole == floor == exact


def check_small(data: bytes) -> None:
    """Ids and public keys: one spelling each."""
    text = text_of(data)
    for prefix in (ids.AGENT, ids.ESCROW, ids.JOURNAL):
        with contextlib.suppress(Malformed):
            assert ids.format_id(prefix, ids.parse_id(prefix, text)) == text
        with contextlib.suppress(Malformed):
            assert ids.parse_id(prefix, ids.format_id(prefix, data)) == data
    assert not keys.verify(BUYER_KEY, b"voucher", data)
    try:
        key = keys.check_public_key(strict.b64url_decode(text, keys.PUBLIC_KEY_BYTES))
    except (Malformed, KeyRefused):
        return
    assert strict.b64url_encode(key) == text
    assert not keys.verify(key, b"voucher", bytes(keys.SIGNATURE_BYTES))


def check_json(data: bytes) -> None:
    """Strict JSON: what it reads, it writes, and reads again as the same value."""
    try:
        value = strict.loads(data)
    except Malformed:
        return
    assert strict.same(value, strict.loads(data))
    assert not strict.same(value, [value])
    written = _without_decimals(value)
    with contextlib.suppress(Malformed):
        assert strict.same(strict.loads(strict.dumps(value)), written)
    for read in (amounts.atomic, amounts.parse_atomic, amounts.to_atomic):
        with contextlib.suppress(AmountInvalid):
            assert _in_range(read(value))
    assert strict.same(strict.loads(strict.dumps(written)), written)


def _without_decimals(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_decimals(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_without_decimals(child) for child in value]
    return str(value) if isinstance(value, Decimal) else value


def check_route(data: bytes) -> None:
    """A route and a path, on two lines: our pattern is the router's, and misses nothing."""
    text, _, path = text_of(data).partition("\n")
    try:
        method, template = routes.parse_route(text)
    except ConfigurationError:
        return
    theirs, _, _ = compile_path(template)
    table = routes.RouteTable([(method, template, "sold")])
    assert table.find("BREW", routes.sample_path(template)) is routes.Miss.METHOD
    found = table.find(method, path)
    assert table.find(method, routes.sample_path(template)) == "sold"
    if theirs.match(path):
        assert found in ("sold", routes.Miss.LENGTH)
    assert table.covers(path) == (found is not routes.Miss.UNPRICED)
    folded = routes.normal_form(path)
    assert folded.startswith("/")
    assert len(folded) <= 3 * len(path) + 1

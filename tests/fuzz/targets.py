"""Every fuzz target by name: its check, its seeds, and how inputs are bent."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tests.fuzz import decoders, programs
from tests.fuzz.mutators import bend_json, bend_text, flip, read_json, write_json
from tests.fuzz.services import EscrowService, ShopService
from tests.fuzz.worlds import RECEIPT, bend_header, bend_offer, bend_token, bend_voucher
from tests.provider.spellings import spellings
from tests.support import payments
from tests.support.payments import METERED, OFFERS, QUOTE, ROOT, SIGNER, UPLOAD, Payment, encode
from x402mw.core import headers, messages, tokens
from x402mw.core.strict import b64url_encode, dumps

Bend = Callable[[bytes, Random], bytes]


@dataclass(frozen=True)
class Target:
    """One thing under fuzz. `bytes_max` bounds its inputs; `decoder` counts for coverage."""

    check: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    bend: Bend
    bytes_max: int = 8 * 1024
    decoder: bool = True


def _headers() -> list[bytes]:
    metered = Payment(terms=METERED, method="POST", target="/summarize", cumulative=9000)
    upload = Payment(terms=UPLOAD, method="POST", target="/upload", binding=1)
    control = Payment(terms=payments.CONTROL, method="POST", target="/.x402/control", cumulative=0)
    return [one.header for one in (Payment(), metered, upload, control)]


def _required() -> list[bytes]:
    accepts = [OFFERS[one.id].accepts for one in (QUOTE, UPLOAD, METERED)]
    resource = {"url": payments.ORIGIN + "/quote/BTC", "description": "A quote"}
    content = {"x402Version": 2, "error": "no", "resource": resource, "accepts": accepts}
    return [encode(content), encode({"x402Version": 2, "accepts": []})]


def _responses() -> list[bytes]:
    found = []
    for state, reason in (("settled", None), ("refused", "cover"), ("running", "running")):
        extra = messages.SettlementExtra(seq="7", state=state, charged_total="1000", open_total="0")
        said = messages.SettlementResponse(
            success=state != "refused",
            transaction=Payment().signed.commitment_id,
            network=payments.NETWORK,
            payer=payments.PAYER,
            amount="1000",
            error_reason=reason and f"invalid_batch_settlement_escrow_{reason}",
            extra=extra,
        )
        found.append(headers.encode_header(said).encode())
    return found


def _tokens() -> list[bytes]:
    return [tokens.sign_session_token(payments.TOKEN, SIGNER).encode()]


def _key_sets() -> list[bytes]:
    retired = tokens.KeySet(
        network=payments.NETWORK,
        serial=2,
        not_after=payments.NOW,
        keys={tokens.key_id(key): key for key in (payments.SIGNER_KEY, payments.BUYER_KEY)},
        retired=frozenset({tokens.key_id(payments.BUYER_KEY)}),
        min_escrow=payments.KEY_SET.min_escrow,
        claim_seconds=300,
    )
    return [tokens.sign_key_set(one, ROOT).encode() for one in (payments.KEY_SET, retired)]


def _routes() -> list[bytes]:
    texts = [
        "GET /quote/{symbol}\n/quote/BTC",
        "HEAD /files/{rest:path}\n/files/a/b",
        "POST /b\n/b",
    ]
    texts += [
        "GET /{a:int}/{b:float}\n/1/1.5",
        "PUT /x-{a}.{b}/{c:uuid}\n/x-1.2/",
        "GET /a/{b}/c\n/",
    ]
    return [text.encode() for text in texts]


def _bend_route(data: bytes, draw: Random) -> bytes:
    text, _, path = data.decode("utf-8", "replace").partition("\n")
    if draw.randrange(3):
        return f"{text}\n{draw.choice(spellings(path, least=0) or [''])}".encode()
    return f"{bend_text(text, draw)}\n{path}".encode("utf-8", "replace")


def _bend_json(data: bytes, draw: Random) -> bytes:
    value = read_json(data)
    if value is None or not draw.randrange(4):
        return flip(data, draw)
    return write_json(bend_json(value, draw), draw)


def _bend_small(data: bytes, draw: Random) -> bytes:
    return bend_text(data.decode("utf-8", "replace"), draw).encode("utf-8", "replace")


SERVICES = {"escrow": EscrowService(), "shop": ShopService()}
TARGETS: dict[str, Target] = {
    "header": Target(decoders.check_header, _headers, bend_header, 5 * 1024),
    "inspect": Target(decoders.check_inspect, _headers, bend_header, 5 * 1024),
    "required": Target(decoders.check_required, _required, bend_header, 33 * 1024),
    "response": Target(decoders.check_response, _responses, bend_header, 9 * 1024),
    "voucher": Target(
        decoders.check_voucher, lambda: [Payment().signed.wire.encode()], bend_voucher, 300
    ),
    "token": Target(decoders.check_token, _tokens, bend_token, 2100),
    "receipt": Target(
        decoders.check_receipt,
        lambda: [tokens.sign_receipt(RECEIPT, payments.RECEIPTS).encode()],
        bend_token,
        2100,
    ),
    "key_set": Target(decoders.check_key_set, _key_sets, bend_token, 33 * 1024),
    "terms": Target(
        decoders.check_terms,
        lambda: [dumps(offer.accepts) for offer in OFFERS.values()],
        bend_offer,
    ),
    "amount": Target(
        decoders.check_amount,
        lambda: [b"0.001", b"1000", b"8.4e-05", b"1E+3", b"0." + b"0" * 29 + b"1", b"-0"],
        _bend_small,
        64,
    ),
    "small": Target(
        decoders.check_small,
        lambda: [payments.PAY_TO.encode(), b64url_encode(payments.BUYER_KEY).encode()],
        _bend_small,
        64,
    ),
    "json": Target(
        decoders.check_json,
        lambda: [dumps(Payment().content), b'[1,-0,1.50,1e-7,true,null,"\\u00e9",{"a":[]}]'],
        _bend_json,
    ),
    "route": Target(decoders.check_route, _routes, _bend_route, 9 * 1024),
    "escrow": Target(
        SERVICES["escrow"].check, programs.escrow_seeds, programs.bend_escrow, decoder=False
    ),
    "shop": Target(SERVICES["shop"].check, programs.shop_seeds, programs.bend_shop, decoder=False),
}

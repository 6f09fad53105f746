"""The official x402 package and we read each other's messages."""

import pytest
from x402.http import utils as official
from x402.schemas.payments import PaymentPayload, PaymentRequired, PaymentRequirements, ResourceInfo
from x402.schemas.responses import SettleResponse

from tests.support import payments as world
from tests.support.payments import METERED, OFFERS, QUOTE, UPLOAD, Payment
from x402mw.core import gate, headers, messages, terms
from x402mw.core.strict import b64_encode, dumps

OFFERED = [QUOTE, UPLOAD, METERED]


def required(offered: terms.Terms) -> dict[str, object]:
    """The content of our 402 header."""
    return {
        "x402Version": 2,
        "error": "Payment required",
        "resource": {"url": world.ORIGIN + "/quote/BTC", "description": "A quote"},
        "accepts": [OFFERS[offered.id].accepts],
    }


@pytest.mark.parametrize("offered", OFFERED)
def test_they_read_our_402(offered: terms.Terms) -> None:
    """Their model keeps every key of our offer, and writes it so that its id still holds."""
    header = b64_encode(dumps(required(offered)))
    theirs = official.decode_payment_required_header(header)
    assert isinstance(theirs, PaymentRequired)
    back = official.encode_payment_required_header(theirs).encode()
    ours = headers.decode_header(messages.PaymentRequired, back, headers.REQUIRED_BYTES_MAX)
    requirements = messages.validate(messages.PaymentRequirements, ours.accepts[0])
    extra = messages.validate(messages.EscrowExtra, requirements.extra)
    assert terms.read_terms(requirements, extra, world.NETWORK_ID) == offered


@pytest.mark.parametrize("offered", OFFERED)
def test_a_payment_built_with_their_models_is_a_claim(offered: terms.Terms) -> None:
    """A foreign client that signs our payload and uses their header codec pays us."""
    payment = Payment(terms=offered)
    theirs = PaymentPayload(
        payload=payment.content["payload"],
        accepted=PaymentRequirements.model_validate(OFFERS[offered.id].accepts),
        resource=ResourceInfo(url=world.ORIGIN + "/quote/BTC"),
        extensions={"other": {"info": {}}},
    )
    header = official.encode_payment_signature_header(theirs).encode()
    claim = gate.inspect([header], world.BOOK, world.open_token)
    assert claim.terms == offered


def test_they_read_our_payment() -> None:
    """Their model reads our payment header without loss."""
    theirs = official.decode_payment_signature_header(Payment().header.decode())
    assert isinstance(theirs, PaymentPayload)
    assert theirs.payload == Payment().content["payload"]
    assert theirs.accepted.extra == OFFERS[QUOTE.id].accepts["extra"]


@pytest.mark.parametrize("state", ["refused", "running", "open", "settled"])
def test_settlements_are_read_both_ways(state: str) -> None:
    """Their settlement model and ours carry the same figures."""
    content = {
        "success": state != "refused",
        "transaction": Payment().signed.commitment_id,
        "network": world.NETWORK,
        "payer": world.PAYER,
        "amount": "1000",
        "errorReason": "invalid_batch_settlement_escrow_cover",
        "extra": {"seq": "7", "state": state, "chargedTotal": "1000", "final": True},
    }
    theirs = official.decode_payment_response_header(b64_encode(dumps(content)))
    assert isinstance(theirs, SettleResponse)
    assert (theirs.transaction, theirs.extra) == (content["transaction"], content["extra"])
    back = official.encode_payment_response_header(theirs).encode()
    ours = headers.decode_header(messages.SettlementResponse, back, headers.RESPONSE_BYTES_MAX)
    assert messages.as_json(ours) == content

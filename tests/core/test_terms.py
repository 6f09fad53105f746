"""Terms: one id on both sides, and no terms that hash well but mean nothing."""

from dataclasses import replace
from typing import Any

import pytest

from tests.support.payments import CONTROL, METERED, NETWORK_ID, QUOTE, UPLOAD, offer_of
from x402mw.core import terms
from x402mw.core.amounts import Atomic
from x402mw.core.errors import Malformed
from x402mw.core.messages import EscrowExtra, PaymentRequirements, validate
from x402mw.core.terms import Terms


def read(accepts: dict[str, Any]) -> Terms:
    """Reads terms as a buyer does."""
    requirements = validate(PaymentRequirements, accepts)
    return terms.read_terms(requirements, validate(EscrowExtra, requirements.extra), NETWORK_ID)


@pytest.mark.parametrize("offered", [QUOTE, UPLOAD, METERED])
def test_terms_read_back(offered: Terms) -> None:
    """A buyer reads the terms that the provider wrote, and computes the same id."""
    found = read(offer_of(offered).accepts)
    assert found == offered
    assert found.id == offered.id
    assert found.metered == (offered.unit != "")


def test_a_buyer_may_send_more_keys_back() -> None:
    """Foreign keys beside ours do not disturb."""
    accepts = offer_of(QUOTE).accepts
    assert read(accepts | {"extra": accepts["extra"] | {"more": [1]}}) == QUOTE


CHANGES: dict[str, Any] = {
    "network_id": bytes(32),
    "pay_to": "ag_" + "ff" * 16,
    "journal": bytes(16),
    "asset": "EURC",
    "amount": Atomic(8101),
    "timeout_seconds": 61,
    "binding": 1,
    "unit": "word",
    "unit_price": 2001,
    "per": 1001,
    "base": Atomic(101),
    "method": "PUT",
    "route": "/summarise",
    "control": "/control",
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_id_covers_every_field(name: str) -> None:
    """Whatever bears on price or payee changes the id; the network's text is in its id."""
    changed = replace(METERED, **{name: CHANGES[name]})
    assert changed.id != METERED.id


@pytest.mark.parametrize(
    "change",
    [
        {"amount": "8101"}, {"amount": 8100}, {"amount": "08100"}, {"amount": "-1"},
        {"asset": "EURC"}, {"payTo": "ag_other"}, {"maxTimeoutSeconds": 61},
        {"maxTimeoutSeconds": True}, {"maxTimeoutSeconds": 2**32}, {"maxTimeoutSeconds": "60"},
        {"extra": None}, {"extra": []}, {"scheme": 1},
    ],
)  # fmt: skip
def test_changed_requirements_are_malformed(change: dict[str, Any]) -> None:
    """Requirements that do not hash to their id, or are no requirements, are refused."""
    with pytest.raises(Malformed):
        read(offer_of(METERED).accepts | change)


@pytest.mark.parametrize(
    "change",
    [
        {"terms": "00" * 32}, {"terms": ""}, {"terms": None}, {"journal": "jr_0"}, {"journal": 1},
        {"route": "GET"}, {"route": "get /x"}, {"route": "GET x"}, {"route": "GET /{a:no}"},
        {"route": "POST /{a}{b}{c}{d}"}, {"binding": True}, {"binding": 256}, {"binding": "0"},
        {"unitPrice": 2000}, {"unitPrice": "2e3"}, {"unitPrice": "2001"}, {"per": "1000"},
        {"per": 0}, {"per": True}, {"base": "101"}, {"base": None}, {"control": 1},
    ],
)  # fmt: skip
def test_changed_extra_is_malformed(change: dict[str, Any]) -> None:
    """Every key of `extra` that the id covers is read strictly and compared."""
    accepts = offer_of(METERED).accepts
    with pytest.raises(Malformed):
        read(accepts | {"extra": accepts["extra"] | change})


@pytest.mark.parametrize(
    "senseless",
    [
        replace(METERED, unit_price=0),
        replace(METERED, per=0),
        replace(METERED, base=Atomic(8101)),
        replace(METERED, unit=""),
        replace(QUOTE, control="https://evil.example.com/"),
        replace(QUOTE, control="//evil.example.com/"),
        replace(QUOTE, control="/\\evil.example.com/"),
        replace(QUOTE, control="control"),
        replace(QUOTE, control="/a b"),
        replace(QUOTE, control=""),
    ],
)
def test_terms_without_sense_are_malformed(senseless: Terms) -> None:
    """A price over nothing, or control on another origin, is refused though its id is right."""
    accepts = terms.write_requirements(
        senseless, escrow="https://escrow.example.com", suggested_deposit=Atomic(0)
    )
    if not senseless.unit:
        meter = {"unitPrice": str(senseless.unit_price), "per": senseless.per}
        accepts["extra"] |= meter | {"base": str(senseless.base)}
    with pytest.raises(Malformed):
        read(accepts)


def test_control_terms_are_the_same_from_any_offer() -> None:
    """Both sides build the control terms without being told them."""
    assert terms.control_terms(METERED) == terms.control_terms(UPLOAD) == CONTROL
    assert (CONTROL.amount, CONTROL.method, CONTROL.route) == (0, "POST", QUOTE.control)


def test_head_is_the_same_route_as_get() -> None:
    """A route written with HEAD hashes as GET."""
    accepts = offer_of(QUOTE).accepts
    head = accepts["extra"] | {"route": "HEAD /quote/{symbol}"}
    assert read(accepts | {"extra": head}) == QUOTE

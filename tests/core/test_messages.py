"""The x402 objects: strict types, camelCase names, nothing else read into them."""

from typing import Any

import pytest

from tests.support.payments import METERED, Payment, offer_of
from x402mw.core import messages
from x402mw.core.errors import Malformed
from x402mw.core.strict import dumps

NUMBER_JUNK = [True, False, -1, 2**63, "1", None, [], {}, "NaN"]
PAYLOAD = Payment().content["payload"]
ACCEPTS = offer_of(METERED).accepts


def test_a_payload_reads_back() -> None:
    """What is written is what is read."""
    content = Payment().content
    read = messages.parse(messages.PaymentPayload, dumps(content))
    assert messages.as_json(read) == content


@pytest.mark.parametrize("value", NUMBER_JUNK)
@pytest.mark.parametrize("name", ["expires", "binding"])
def test_junk_numbers_in_the_payload_are_malformed(name: str, value: Any) -> None:
    """Integers are JSON integers in range; booleans and texts are none."""
    with pytest.raises(Malformed):
        messages.validate(messages.EscrowPayload, PAYLOAD | {name: value})


@pytest.mark.parametrize("text", ["1.0", "1e0", "300.0"])
def test_a_number_with_a_point_is_no_integer(text: str) -> None:
    """1.0 is not 1."""
    for name in ("expires", "binding"):
        raw = dumps(PAYLOAD | {name: "@"}).replace(b'"@"', text.encode())
        with pytest.raises(Malformed):
            messages.parse(messages.EscrowPayload, raw)


@pytest.mark.parametrize("name", list(PAYLOAD))
def test_the_payload_is_complete(name: str) -> None:
    """Every key of the payload is needed."""
    short = {key: value for key, value in PAYLOAD.items() if key != name}
    with pytest.raises(Malformed, match=name):
        messages.validate(messages.EscrowPayload, short)


def test_unknown_keys_in_the_payload_are_refused() -> None:
    """The payload is ours: a key nobody knows might have been meant."""
    with pytest.raises(Malformed, match="more"):
        messages.validate(messages.EscrowPayload, PAYLOAD | {"more": 1})


@pytest.mark.parametrize("version", [1, 3, 0, True, "2", None])
def test_other_versions_are_malformed(version: object) -> None:
    """Only x402 version 2 is spoken."""
    with pytest.raises(Malformed, match="x402Version"):
        messages.validate(messages.PaymentRequired, {"x402Version": version, "accepts": []})


def test_version_two_point_zero_is_malformed() -> None:
    """2.0 is not 2."""
    with pytest.raises(Malformed):
        messages.parse(messages.PaymentRequired, b'{"x402Version":2.0,"accepts":[]}')


def test_names_on_the_wire_are_camel_case() -> None:
    """A snake_case name is an unknown key, so one field never has two spellings."""
    renamed = {key: value for key, value in ACCEPTS.items() if key != "payTo"}
    with pytest.raises(Malformed, match="payTo"):
        messages.validate(messages.PaymentRequirements, renamed | {"pay_to": ACCEPTS["payTo"]})
    both = messages.validate(messages.PaymentRequirements, ACCEPTS | {"pay_to": "ag_other"})
    assert both.pay_to == ACCEPTS["payTo"]


def test_unknown_keys_of_x402_are_ignored() -> None:
    """Other parts of x402 may add keys to its own objects."""
    read = messages.validate(messages.PaymentRequirements, ACCEPTS | {"new": 1})
    extra = messages.validate(messages.EscrowExtra, read.extra | {"new": 1})
    assert (extra.unit, extra.unit_price, extra.per, extra.base) == ("token", "2000", 1000, "100")


def test_a_malformed_key_of_any_length_makes_a_short_message() -> None:
    """What a stranger sends never makes our own answer too long to read."""
    with pytest.raises(Malformed) as caught:
        messages.validate(messages.EscrowPayload, PAYLOAD | {"k" * 5000: 1})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", [None, [], "x", 1])
def test_anything_but_an_object_is_malformed(value: object) -> None:
    """A message is an object."""
    with pytest.raises(Malformed, match="object"):
        messages.validate(messages.PaymentRequired, value)

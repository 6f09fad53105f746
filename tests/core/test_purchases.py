"""The key of a purchase, and what oracles sign: pure values that others must be able to remake."""

import hashlib
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x402mw.core.amounts import Atomic
from x402mw.core.errors import AmountInvalid, LocalError
from x402mw.core.keys import public_key, verify
from x402mw.core.outcomes import outcome_message, sign_outcome
from x402mw.core.purchases import purchase_key
from x402mw.core.strict import b64url_encode

PURCHASE: dict[str, Any] = {
    "session": "s1",
    "task": "weekly report",
    "vendor": "ag_1",
    "resource": "GET /quote/{symbol}",
    "asset": "USDC",
    "max_amount": Atomic(1000),
    "parameters": {"symbol": "BTC", "days": 7, "parts": ["a", None, True]},
}


def key(**changes: Any) -> str:
    """The key of the purchase above, with some changes."""
    return purchase_key(**{**PURCHASE, **changes})


def test_the_bytes_under_a_key() -> None:
    """Rule 8: SHA-256 over the tag and one JSON list, as anybody can write it."""
    text = (
        '["s1","weekly report","ag_1","GET /quote/{symbol}","USDC","1000",'
        '{"days":7,"parts":["a",null,true],"symbol":"BTC"},0]'
    )
    digest = hashlib.sha256(b"x402mw/purchase\x00\x01" + text.encode()).digest()
    assert key() == b64url_encode(digest)
    assert len(key()) == 43


def test_each_part_counts() -> None:
    """Rule 8: another session, task, vendor, ... or occurrence is another purchase."""
    changes: list[dict[str, Any]] = [
        *({name: "other"} for name in ("session", "task", "vendor", "resource", "asset")),
        {"max_amount": Atomic(1001)},
        {"parameters": {}},
        {"parameters": {"symbol": "BTC", "days": "7", "parts": ["a", None, True]}},
        {"parameters": {"symbol": "BTC", "days": 7, "parts": ["a", None, 1]}},
        {"occurrence": 1},
        {"session": 's1","weekly report', "task": ""},
    ]
    assert len({key(), *(key(**change) for change in changes)}) == len(changes) + 1


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc"), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text("xyz", max_size=3), PLAIN, max_size=4))
def test_the_order_of_parameters_does_not_count(parameters: dict[str, Any]) -> None:
    """Rule 8: the same parameters in another order are the same purchase."""
    turned = dict(reversed(parameters.items()))
    assert key(parameters=parameters) == key(parameters=turned)


@pytest.mark.parametrize("value", [0.1, Decimal("0.1"), b"x", {1: "x"}, {"a": {2: 3}}, "\ud800"])
def test_what_has_no_one_spelling_has_no_key(value: Any) -> None:
    """Rule 8: a key is made of what every language writes in the same way."""
    with pytest.raises(LocalError):
        key(parameters={"value": value})


def test_amounts_and_counts_are_whole() -> None:
    """M1: the maximum and the occurrence are whole numbers, the names are texts."""
    for wrong in (-1, True, 2**63, "1.00", None):
        with pytest.raises(AmountInvalid):
            key(max_amount=wrong)
        with pytest.raises(AmountInvalid):
            key(occurrence=wrong)
    with pytest.raises(LocalError):
        key(session=7)


def test_what_an_oracle_signs() -> None:
    """E24: the outcome's hash under the id of one escrow; for another it is no signature."""
    seed, one, other = b"o" * 32, b"1" * 16, b"2" * 16
    signature = sign_outcome(one, "done", seed)
    message = b"x402mw/outcome\x00\x01" + one + hashlib.sha256(b"done").digest()
    assert outcome_message(one, "done") == message
    assert verify(public_key(seed), message, signature)
    assert not verify(public_key(seed), outcome_message(other, "done"), signature)

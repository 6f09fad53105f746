"""Junk in every field of a payment: never a 5xx, never the handler, nothing in the journal."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.payments import encode
from tests.support.provider import Handler, selling
from x402mw.core.strict import b64_encode, b64url_encode
from x402mw.provider import PerCall

pytestmark = pytest.mark.anyio

QUIET = settings(suppress_health_check=list(HealthCheck), max_examples=80)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(min_value=-(2**70), max_value=2**70),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["", "0", "-1", "1e3", "٣", "\x00", "esc_" + "0" * 32, "A" * 235, "a.b.c"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
PLACES = [
    *[("x402Version",), ("payload",), ("accepted",), ("payload", "voucher"), ("payload", "token")],
    *[("payload", "expires"), ("payload", "binding"), ("payload", "more"), ("more",)],
    *[("accepted", name) for name in ("scheme", "network", "asset", "amount", "payTo", "extra")],
    *[("accepted", "maxTimeoutSeconds")],
    *[("accepted", "extra", name) for name in ("journal", "terms", "route", "binding", "control")],
    *[("accepted", "extra", name) for name in ("unit", "unitPrice", "per", "base", "escrow")],
]


@pytest.fixture
async def shop(tmp_path):
    async with selling(Handler(), {"GET /quote/{symbol}": PerCall("0.001")}, tmp_path) as found:
        yield found


async def refuses(shop: Any, header: bytes) -> None:
    """Sends a header that must be refused, to the route and to the control path."""
    serial, runs = shop.journal.serial, shop.middleware.app.runs
    for method, target in (("GET", "/quote/BTC"), ("POST", "/x402mw/control")):
        answer = await shop.call(method, target, [(b"payment-signature", header)])
        assert answer.status in (400, 402), answer
    assert (shop.journal.serial, shop.middleware.app.runs) == (serial, runs)


@QUIET
@given(value=st.binary(max_size=200))
async def test_junk_bytes(shop, value):
    """Any bytes as a header."""
    await refuses(shop, value)


@QUIET
@given(value=VALUES)
async def test_junk_json(shop, value):
    """Any JSON as a payment."""
    await refuses(shop, b64_encode(json.dumps(value).encode()).encode())


@settings(QUIET, max_examples=300)
@given(place=st.sampled_from(PLACES), value=VALUES)
async def test_junk_in_one_field(shop, place, value):
    """A good payment with junk in one field: refused, unless that field may hold anything."""
    content = json.loads(json.dumps(shop.payment().content))
    inner = content
    for name in place[:-1]:
        inner = inner[name]
    if place in (("more",), ("accepted", "extra", "escrow")) or inner.get(place[-1]) == value:
        return
    if value in ("", "0", 0) and place[-1] in ("unit", "unitPrice", "per", "base"):
        return
    inner[place[-1]] = value
    await refuses(shop, b64_encode(json.dumps(content).encode()).encode())


@QUIET
@given(data=st.data())
async def test_one_flipped_bit(shop, data):
    """One bit changed anywhere in the signed voucher: refused."""
    payment = shop.payment()
    raw = bytearray(payment.signed.raw + payment.signed.signature)
    bit = data.draw(st.integers(0, len(raw) * 8 - 1))
    raw[bit // 8] ^= 1 << bit % 8
    content = payment.content
    content["payload"]["voucher"] = b64url_encode(bytes(raw))
    await refuses(shop, encode(content))


@QUIET
@given(
    fields=st.lists(
        st.tuples(
            st.sampled_from(
                [b"host", b"content-length", b"accept", b"authorization", b"cookie", b"x-y"]
            ),
            st.binary(max_size=30),
        ),
        max_size=6,
    ),
    query=st.binary(max_size=20),
)
async def test_junk_in_other_fields(shop, fields, query):
    """Junk in any other header field or the query of an unpaid request: 402 or 421."""
    answer = await shop.call("GET", "/quote/BTC", fields, query_string=query)
    assert answer.status in (402, 421)
    assert shop.middleware.app.runs == 0

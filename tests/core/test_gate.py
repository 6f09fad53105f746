"""The gate, steps 2 to 8: what is refused before any row is looked at."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import payments as world
from tests.support.payments import BOOK, METERED, NOW, QUOTE, TOKEN, UPLOAD, Payment
from x402mw.core import gate, keys, tokens, vouchers
from x402mw.core.gate import Refused
from x402mw.core.strict import b64url_decode, b64url_encode, same

OTHER_JOURNAL = bytes(16)


def refusal(payment: Payment, book: gate.Book = BOOK, *, control: bool = False) -> Refused:
    """The refusal of a payment in steps 2 to 7."""
    with pytest.raises(Refused) as caught:
        world.inspect(payment, book, control=control)
    return caught.value


def judged(*values: bytes) -> Refused:
    """The refusal of raw header values."""
    with pytest.raises(Refused) as caught:
        gate.inspect(values, BOOK, world.open_token)
    return caught.value


@pytest.mark.parametrize(
    "payment",
    [
        Payment(),
        Payment(terms=UPLOAD, method="POST", target="/upload", body=b"x"),
        Payment(terms=UPLOAD, method="POST", target="/upload", binding=1, body=b"x"),
        Payment(terms=METERED, method="POST", target="/summarize", body=b"{}"),
        Payment(target="/quote/BTC?depth=2", seq=vouchers.SEQ_MAX, cumulative=2**63 - 1),
        Payment(token=replace(TOKEN, exp=1, claim_until=2)),
    ],
)
def test_a_sound_payment_passes(payment: Payment) -> None:
    """A payment that was made right is a claim for exactly its request, also when late."""
    claim = world.inspect(payment)
    world.bind(claim, payment)
    assert (claim.session, claim.seq) == (payment.session, payment.seq)
    assert claim.commitment.hex() == payment.signed.commitment_id
    assert claim.terms == payment.terms


def test_the_unbound_body_may_be_anything() -> None:
    """With binding 1 the body is left out of the signature."""
    payment = Payment(terms=UPLOAD, method="POST", target="/upload", binding=1)
    world.bind(world.inspect(payment), replace(payment, body=b"anything"))


def test_exactly_one_header() -> None:
    """None or two payment headers are refused before either is read."""
    header = Payment().header
    for values in ((), (header, header), (header, b"")):
        assert (judged(*values).status, judged(*values).reason) == (400, "payment_header")


@given(st.binary(max_size=300))
def test_any_header_bytes_are_refused(value: bytes) -> None:
    """Header bytes of any kind are 400, and nothing else is ever raised."""
    found = judged(value)
    assert (found.status, found.reason, found.final, found.seq) == (400, "malformed", True, None)


def test_an_overlong_header_is_refused() -> None:
    """More than 4 KiB are not decoded."""
    assert judged(b"A" * 4097).reason == "malformed"


JUNK: list[Any] = [
    None, True, False, -1, 0, 2**63, 2**64, 10**400, 1, "", "x", "\x00", "é", [], {}, [[]],
    {"a": 1}, "9" * 400, "1e3", "\u0663", {"a": {"b": {"c": {}}}},
]  # fmt: skip


def paths_of(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key path of a JSON object."""
    if not isinstance(value, dict):
        return [path]
    below = [found for key, child in value.items() for found in paths_of(child, (*path, key))]
    return [*([path] if path else []), *below]


PATHS = paths_of(Payment(terms=METERED).content)


@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_junk_in_every_field_is_a_typed_refusal(path: tuple[str, ...]) -> None:
    """Whatever stands in a field, the answer is a claim or a 400 or 402, never another error."""
    payment = Payment(terms=METERED, method="POST", target="/summarize")
    for junk in JUNK:
        content = payment.content
        place = content
        for key in path[:-1]:
            place = place[key]
        if same(place[path[-1]], junk):
            continue
        place[path[-1]] = junk
        try:
            world.bind(gate.inspect([world.encode(content)], BOOK, world.open_token), payment)
        except Refused as found:
            assert found.status in (400, 402)
        else:
            # Only the deposit that we suggest, and the escrow's address, bear on nothing.
            assert path[-1] in ("suggestedDeposit", "escrow")


def test_a_boolean_in_an_echoed_offer_is_refused() -> None:
    """An offer sent back with `false` for 0, or 60.0 for 60, is not our offer."""
    content = Payment().content
    content["accepted"] = dict(content["accepted"], extra=dict(content["accepted"]["extra"]))
    content["accepted"]["extra"]["binding"] = False
    assert judged(world.encode(content)).reason == "malformed"
    raw = gate.headers.b64_decode(Payment().header).replace(b'Seconds":60', b'Seconds":60.0')
    assert judged(gate.headers.b64_encode(raw).encode()).reason == "malformed"


def test_every_flipped_bit_of_the_voucher_is_refused() -> None:
    """A header whose voucher differs in one bit is never a claim."""
    whole = b64url_decode(Payment().signed.wire, vouchers.SIGNED_BYTES)
    for bit in range(len(whole) * 8):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        found = refusal(Payment(changes={"voucher": b64url_encode(bytes(flipped))}))
        assert found.status in (400, 402)
        assert found.reason in ("malformed", "constants", "signature")


@pytest.mark.parametrize(
    ("payment", "status", "reason", "final"),
    [
        (Payment(key=world.SIGNER), 402, "signature", True),
        (Payment(session=bytes(16)), 402, "constants", True),
        (Payment(network_id=bytes(32)), 402, "constants", True),
        (Payment(token=replace(TOKEN, session=bytes(16))), 402, "constants", True),
        (Payment(token=replace(TOKEN, pay_to="ag_other")), 402, "constants", True),
        (Payment(token=replace(TOKEN, asset="EURC")), 402, "constants", True),
        (Payment(token=replace(TOKEN, journal=OTHER_JOURNAL)), 402, "constants", True),
        (Payment(token=replace(TOKEN, network="escrow:b")), 402, "token", False),
        (Payment(changes={"token": "x.y.z"}), 402, "token", False),
        (Payment(terms=replace(QUOTE, journal=OTHER_JOURNAL)), 402, "constants", True),
        (Payment(terms=replace(QUOTE, network="escrow:b")), 402, "constants", True),
        (Payment(terms=replace(QUOTE, pay_to="ag_other")), 402, "constants", True),
        (Payment(terms=replace(QUOTE, asset="EURC")), 402, "constants", True),
        (Payment(terms=replace(QUOTE, network_id=bytes(32))), 400, "malformed", True),
        (Payment(terms=replace(QUOTE, amount=world.Atomic(0))), 400, "amount", True),
        (Payment(terms=world.CONTROL), 400, "amount", True),
        (Payment(binding=1), 400, "binding", True),
        (Payment(binding=2), 400, "binding", True),
        (Payment(terms=replace(UPLOAD, binding=255), binding=255), 400, "binding", True),
    ],
)
def test_what_is_meant_for_another_is_refused(
    payment: Payment, status: int, reason: str, final: bool
) -> None:
    """Another key, session, network, payee, asset, journal, scheme or binding never passes."""
    found = refusal(payment)
    assert (found.status, found.reason, found.final) == (status, reason, final)
    assert found.seq == payment.seq
    assert found.commitment is not None
    assert (found.call, found.account, found.best) == (None, None, None)


def test_a_refusal_from_outside_can_be_named() -> None:
    """What the shell refuses by itself names the payment too, if the headers hold one."""
    for values, seq in (([Payment().header], 7), ([], None), ([b"junk"], None)):
        found = Refused(413, "body_too_large", "too large")
        gate.name_refusal(found, values)
        assert found.seq == seq
    gate.name_refusal(named := refusal(Payment(key=world.SIGNER)), [])
    assert named.seq == 7


def test_another_scheme_is_refused() -> None:
    """A payment of another x402 scheme is for somebody else."""
    content = Payment().content
    content["accepted"] = content["accepted"] | {"scheme": "exact"}
    assert judged(world.encode(content)).reason == "constants"


def test_an_unknown_key_asks_to_come_back() -> None:
    """A token by a key we have not heard of is 503: a fresh key set may know it."""
    content = Payment().content
    content["payload"]["token"] = tokens.sign_session_token(TOKEN, world.ROOT)
    found = judged(world.encode(content))
    assert (found.status, found.reason, found.final) == (503, "unknown_key", False)
    assert found.retry_after > 0


def test_a_replaced_journal_is_told() -> None:
    """Sessions of a journal that a restored backup gave up are 409, never 402."""
    book = replace(BOOK, journal=OTHER_JOURNAL, replaced=frozenset([world.JOURNAL]))
    found = refusal(Payment(), book)
    assert (found.status, found.reason) == (409, "journal_replaced")


def test_control_takes_its_own_terms_only() -> None:
    """On the control path a payment of nothing passes, and no other terms do."""
    payment = Payment(terms=world.CONTROL, method="POST", target=QUOTE.control, body=b"{}")
    claim = world.inspect(payment, control=True)
    world.bind(claim, payment)
    assert refusal(Payment(), control=True).reason == "control_terms"
    free = replace(QUOTE, amount=world.Atomic(0))
    assert refusal(Payment(terms=free), control=True).reason == "control_terms"


def test_foreign_keys_beside_ours_pass() -> None:
    """`accepted.extra` may hold keys of other parts of x402."""
    content = Payment().content
    extra = content["accepted"]["extra"] | {"more": "x"}
    content["accepted"] = content["accepted"] | {"extra": extra}
    assert gate.inspect([world.encode(content)], BOOK, world.open_token).terms == QUOTE


@pytest.mark.parametrize("name", ["zz", "é", "00", 1, None])
def test_an_odd_terms_id_is_malformed(name: object) -> None:
    """A terms id that is none is refused, not looked up."""
    content = Payment().content
    extra = content["accepted"]["extra"] | {"terms": name}
    content["accepted"] = content["accepted"] | {"extra": extra}
    assert judged(world.encode(content)).reason == "malformed"


MOVED: dict[str, dict[str, Any]] = {
    "route": {"target": "/other/BTC"},
    "symbol": {"target": "/quote/ETH"},
    "query": {"target": "/quote/BTC?x=1"},
    "method": {"method": "HEAD"},
    "body": {"body": b"x"},
    "origin": {"origin": "https://other.example.com"},
    "scheme": {"origin": "http://api.example.com"},
    "empty query": {"target": "/quote/BTC?"},
    "spelling": {"target": "/quote/%42TC"},
}


@pytest.mark.parametrize("name", MOVED)
def test_a_voucher_moved_to_another_request_is_refused(name: str) -> None:
    """A voucher is good for one method, origin, target and body."""
    claim = world.inspect(Payment())
    with pytest.raises(Refused) as caught:
        world.bind(claim, replace(Payment(), **MOVED[name]))
    found = caught.value
    assert (found.status, found.reason, found.final) == (400, "request_binding", True)
    assert found.seq == claim.seq
    assert found.more["saw"]["target"] == MOVED[name].get("target", "/quote/BTC")


@pytest.mark.parametrize("change", [{"expires": (NOW + 301) * 1000}, {"binding": 1}])
def test_header_fields_are_signed_too(change: dict[str, Any]) -> None:
    """Expiry and binding stand in the header but are part of what was signed."""
    payment = Payment(terms=UPLOAD, method="POST", target="/upload", changes=change)
    with pytest.raises(Refused, match="another request"):
        world.bind(world.inspect(payment), payment)


def test_other_terms_are_another_request() -> None:
    """A voucher under terms of another price does not fit the price it is presented with."""
    content = Payment().content
    dearer = replace(QUOTE, amount=world.Atomic(1))
    content["accepted"] = world.offer_of(dearer).accepts
    claim = gate.inspect([world.encode(content)], BOOK, world.open_token)
    with pytest.raises(Refused, match="another request"):
        world.bind(claim, Payment())


def test_both_sides_use_one_check() -> None:
    """The gate verifies with the function that the escrow uses."""
    assert gate.verify_voucher is vouchers.verify_voucher
    assert vouchers.verify is keys.verify

"""The buyer's table, row by row: what each answer to a payment does to the hold and the caller."""

import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.client.scripted import ORIGIN, route, sent_payment, sent_voucher
from tests.client.world import World
from tests.support import payments
from x402mw.core.amounts import ZERO, Atomic
from x402mw.core.errors import (
    AccountsDiffer,
    PaidOutcomeGone,
    PaymentOutcomeUnknown,
    PaymentRefused,
)
from x402mw.core.strict import b64_decode, b64_encode, dumps
from x402mw.provider.answers import Figures, payment_response
from x402mw_client import answers
from x402mw_client.answers import Word, read_word

pytestmark = pytest.mark.anyio


def said(raw: bytes) -> httpx.Response:
    """An answer with these bytes as the provider's word."""
    return httpx.Response(200, headers={"PAYMENT-RESPONSE": b64_encode(raw)})


async def warm(world: World) -> None:
    """One paid call, so that terms and session are known."""
    assert (await world.get("/item/a")).text == "ran 1"
    assert world.money() == (1000, 0)


def seqs(world: World) -> set[int]:
    """The seqs of all payments after the first call."""
    return {sent_voucher(request).voucher.seq for request in world.signed[1:]}


def forms(world: World) -> list[str]:
    """The vouchers of all payments after the first call."""
    return [sent_payment(request).payload.voucher for request in world.signed[1:]]


async def test_settled(world: World) -> None:
    """A settled call becomes its charge, and the caller learns what it cost."""
    world.provider.charge = 400
    answer = await world.get("/item/a")
    assert answer.text == "ran 1"
    paid = answer.extensions["x402mw_payment"]
    assert (paid.charge, paid.amount, paid.url) == (400, 1000, f"{ORIGIN}/item/a")
    assert world.money() == (400, 0)


async def test_a_failed_call_costs_nothing(world: World) -> None:
    """The handler's own error reaches the caller as it is, with a charge of nothing."""
    world.provider.status = 500
    assert (await world.get("/item/a")).status_code == 500
    assert world.money() == (0, 0)


@pytest.mark.parametrize("lost", ["lose_answer", "lose_request", "cut_answer"])
async def test_a_lost_answer_is_asked_for_again(world: World, lost: str) -> None:
    """The very same bytes are sent again; the call runs and is charged once."""
    await warm(world)
    world.provider.script = [getattr(world.provider, lost)] * 3
    assert (await world.get("/item/a")).text == "ran 2"
    assert len(forms(world)) == 4
    assert len(set(forms(world))) == 1
    assert (world.provider.ran, world.money()) == (2, (2000, 0))


@pytest.mark.parametrize("status", [402, 502, 503, 504])
async def test_a_proxys_failure_is_a_lost_answer(world: World, status: int) -> None:
    """Without the provider's word these statuses decide nothing: the same bytes go again."""
    await warm(world)
    world.provider.script = [world.provider.answer(status, serve=True)]
    assert (await world.get("/item/a")).text == "ran 2"
    assert len(set(forms(world))) == 1
    assert world.money() == (2000, 0)


async def test_three_times_and_no_more(world: World) -> None:
    """After three repeats the outcome is unknown: held, typed, and resumed without a second pay."""
    await warm(world)
    world.provider.script = [world.provider.lose_answer] * 4
    with pytest.raises(PaymentOutcomeUnknown) as unknown:
        await world.get("/item/a")
    assert world.money() == (1000, 1000)
    answer = await world.resume(unknown.value.handle)
    assert (answer.status_code, answer.text) == (200, "ran 2")
    assert answer.request.url == f"{ORIGIN}/item/a"
    assert len(set(forms(world))) == 1
    assert (world.provider.ran, world.money()) == (2, (2000, 0))


@pytest.mark.parametrize("status", [200, 302, 404, 500])
async def test_a_foreign_answer_is_never_sent_again(world: World, status: int) -> None:
    """An answer without the provider's word goes to the caller; the amount stays held."""
    await warm(world)
    world.provider.script = [world.provider.answer(status)]
    assert (await world.get("/item/a")).text == "proxy"
    assert len(world.signed) == 2
    assert world.money() == (1000, 1000)


@pytest.mark.parametrize(
    "garbage",
    ["", "!", "e30=", "eyJhIjoxfQ==", "A" * 9000],
    ids=["empty", "no base64", "no fields", "other fields", "oversized"],
)
async def test_a_garbled_word_is_no_word(world: World, garbage: str) -> None:
    """A `PAYMENT-RESPONSE` that is not one decides nothing."""
    await warm(world)
    world.provider.script = [world.provider.answer(200, PAYMENT_RESPONSE=garbage)]
    assert (await world.get("/item/a")).text == "proxy"
    assert world.money() == (1000, 1000)


USUAL = {
    "success": True, "transaction": "0f" * 32, "network": "escrow:test", "amount": "1000",
    "extra": {
        "seq": "7", "state": "settled", "final": True, "chargedTotal": "5000", "openTotal": "0",
    },
    "payer": "ag_" + "0b" * 16,
}  # fmt: skip
OTHERS = ["", "0", "00", "7", "-1", "1000", "1" * 18, "1" * 19, "9" * 19, "é", "\\", '"', None, 7]


@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(USUAL, st.sampled_from(OTHERS))),
    st.dictionaries(st.sampled_from([*USUAL["extra"], "voucher"]), st.sampled_from(OTHERS)),
)
def test_the_usual_word_reads_like_any_other(one: dict[str, Any], inner: dict[str, Any]) -> None:
    """A word in the form of our providers means what the same word in another form means."""
    content = USUAL | {"extra": USUAL["extra"] | inner} | one
    usual = read_word(said(dumps(content)), 7)
    assert usual == read_word(said(json.dumps(content, indent=1).encode()), 7)


def test_our_providers_write_the_usual_word() -> None:
    """What ends a paid call of our own provider is read the short way, and right."""
    figures = Figures(bytes(32), 7, payments.PAYER, "settled", True, ZERO, Atomic(5000), ZERO)
    raw = b64_decode(payment_response(payments.BOOK, figures)[1])
    assert answers._USUAL.fullmatch(raw)
    assert read_word(said(raw), 7) == Word("settled", "", True, 0, "00" * 32, 5000, 0)


@pytest.mark.parametrize("at", range(len(dumps(USUAL))))
def test_a_usual_word_with_one_byte_changed(at: int) -> None:
    """Whatever stands in a place of it, it is read as if there were no usual form."""
    for byte in b' 0"}\\x\n\x80':
        raw = bytearray(dumps(USUAL))
        raw[at] = byte
        assert read_word(said(bytes(raw)), 7) == read_word(said(bytes(raw) + b" "), 7)


async def test_a_word_on_another_call_is_no_word(world: World) -> None:
    """What names another seq says nothing about this call."""
    await warm(world)
    world.provider.script = [world.provider.says(402, "refused", seq="7")]
    assert (await world.get("/item/a")).text == "ran 2"
    assert len(set(forms(world))) == 1


async def test_not_sent_at_all(world: World) -> None:
    """If no connection came about nothing is held, and the caller gets httpx's own error."""
    await warm(world)

    def away(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("away")

    world.provider.script = [away]
    with pytest.raises(httpx.ConnectError):
        await world.get("/item/a")
    assert world.money() == (1000, 0)


async def test_running(world: World) -> None:
    """While the call runs the same bytes are sent again after `Retry-After`."""
    await warm(world)
    running = world.provider.says(409, "running", reason="running", final=False)
    begun = world.provider.says(409, "open", reason="running", final=False)
    world.provider.script = [world.provider.lose_request, running, begun, running]
    assert (await world.get("/item/a")).text == "ran 2"
    assert len(forms(world)) == 5
    assert len(set(forms(world))) == 1


async def test_refused_for_now(world: World) -> None:
    """A busy provider gets the same bytes again, while the caller would wait for an answer."""
    await warm(world)
    world.provider.script = [
        world.provider.says(503, "refused", reason="max_unredeemed", final=False),
        world.provider.says(429, "refused", reason="quota", final=False),
    ]
    assert (await world.get("/item/a")).text == "ran 2"
    assert len(set(forms(world))) == 1


async def test_refused_for_too_long(world: World) -> None:
    """Giving up after a refusal that is not final keeps the hold: it may still be executed."""
    await warm(world)
    world.provider.script = [world.provider.refusal(503, "escrow_away", retry_after=7)]
    with pytest.raises(PaymentOutcomeUnknown, match="may still be executed"):
        await world.get("/item/a")
    assert world.money() == (1000, 1000)


@pytest.mark.parametrize("status", [400, 413, 421])
async def test_rejected(world: World, status: int) -> None:
    """A request that can never be admitted frees its hold and shows its answer."""
    await warm(world)
    world.provider.script = [world.provider.refusal(status, "request_binding", final=True)]
    assert (await world.get("/item/a")).status_code == status
    assert world.money() == (1000, 0)


async def test_a_price_rise_is_followed_within_the_limits(world: World) -> None:
    """Fresh terms are signed under the same seq, and the hold is the dearer of both."""
    await warm(world)
    world.provider.routes = [route("GET", "/item/{name}", 3000)]
    assert (await world.get("/item/a")).text == "ran 2"
    assert len(seqs(world)) == 1
    assert len(set(forms(world))) == 2
    assert world.money() == (4000, 0)


async def test_a_price_rise_beyond_the_limits_is_not(world: World) -> None:
    """Policy sees fresh terms like any others."""
    await warm(world)
    world.provider.routes = [route("GET", "/item/{name}", 10_001)]
    with pytest.raises(Exception, match="per_request"):
        await world.get("/item/a")
    assert world.provider.ran == 1
    assert world.money()[0] == 1000


async def test_a_new_token_is_fetched_when_asked_for(world: World) -> None:
    """A refused token is renewed, and the call goes on with the same seq."""
    await warm(world)
    world.provider.script = [world.provider.refusal(402, "token_expired")]
    assert (await world.get("/item/a")).text == "ran 2"
    assert world.escrow.count("/token") == 1
    assert len(seqs(world)) == 1


async def test_never_more_than_three_new_forms(world: World) -> None:
    """A provider that refuses every form ends in an unknown outcome, not in a loop."""
    await warm(world)
    world.provider.script = [world.provider.refusal(402, "terms")] * 10
    with pytest.raises(PaymentOutcomeUnknown):
        await world.get("/item/a")
    assert len(forms(world)) == 4
    assert len(seqs(world)) == 1


async def test_a_final_refusal(world: World) -> None:
    """What can never be admitted is freed and raised with the provider's reason."""
    await warm(world)
    world.provider.script = [world.provider.refusal(402, "signature", final=True)]
    with pytest.raises(PaymentRefused) as refused:
        await world.get("/item/a")
    assert refused.value.reason == "signature"
    assert world.money() == (1000, 0)


async def test_a_closing_session_is_replaced(world: World) -> None:
    """If the session takes no calls any more, another one pays, under another seq."""
    await warm(world)
    world.provider.script = [world.provider.refusal(402, "session_closing", final=True)]
    assert (await world.get("/item/a")).text == "ran 2"
    assert len(world.escrow.sessions) == 2
    assert len(seqs(world)) == 2
    assert world.money() == (2000, 0)


async def test_another_form_of_ours_was_admitted(world: World) -> None:
    """409 `seq_used` naming an older form of ours brings that form's answer."""
    await warm(world)

    def refuse_and_serve(request: httpx.Request) -> httpx.Response:
        refusal = world.provider.refusal(402, "terms")(request)
        world.provider.honest(request)
        world.clock.now += 1
        return refusal

    world.provider.script = [refuse_and_serve]
    assert (await world.get("/item/a")).text == "ran 2"
    first, second, third = forms(world)
    assert first == third != second
    assert (world.provider.ran, world.money()) == (2, (2000, 0))


async def test_a_form_we_never_signed_was_admitted(world: World) -> None:
    """409 `seq_used` naming a stranger's voucher stops the session."""
    await warm(world)
    world.provider.script = [
        world.provider.says(409, "settled", reason="seq_used", commitment=bytes(32))
    ]
    with pytest.raises(AccountsDiffer):
        await world.get("/item/a")
    with pytest.raises(AccountsDiffer):
        await world.get("/item/a")
    assert len(forms(world)) == 1


@pytest.mark.parametrize("reason", ["outcome_gone", "credentials"])
async def test_the_answer_is_gone(world: World, reason: str) -> None:
    """A settled call whose answer is not kept raises, with what it cost."""
    await warm(world)
    gone = world.provider.says(410, "settled", reason=reason, charge=600, charged_total="1600")
    world.provider.script = [world.provider.lose_request, gone]
    with pytest.raises(PaidOutcomeGone) as error:
        await world.get("/item/a")
    assert error.value.charge == 600
    assert world.money() == (1600, 0)


async def test_a_voided_call_is_no_payment(world: World) -> None:
    """A call that the provider gave up costs nothing, and says so."""
    await warm(world)
    gone = world.provider.says(410, "settled", reason="outcome_gone", charge=0)
    world.provider.script = [world.provider.lose_request, gone]
    with pytest.raises(PaymentRefused):
        await world.get("/item/a")
    assert world.money() == (1000, 0)


async def test_a_replaced_journal_on_first_sending(world: World) -> None:
    """A provider restored from a backup gets a new session: what was refused never ran."""
    await warm(world)
    world.provider.replaced, world.provider.journal = frozenset({world.provider.journal}), b"n" * 16
    assert (await world.get("/item/a")).text == "ran 2"
    assert len(world.escrow.sessions) == 2
    assert world.money() == (2000, 0)


async def test_a_replaced_journal_after_a_lost_answer(world: World) -> None:
    """What may have run under the old journal is unknown under the new one, and stays held."""
    await warm(world)

    def serve_and_vanish(request: httpx.Request) -> httpx.Response:
        world.provider.honest(request)
        world.provider.replaced = frozenset({world.provider.journal})
        world.provider.journal = b"n" * 16
        raise httpx.ReadError("lost")

    world.provider.script = [serve_and_vanish]
    with pytest.raises(PaymentOutcomeUnknown):
        await world.get("/item/a")
    assert world.provider.ran == 2
    assert world.money() == (1000, 1000)


async def test_a_route_that_is_no_longer_priced(world: World) -> None:
    """`not_priced` is answered by sending the request without payment."""
    await warm(world)
    problem = {"type": "urn:x402mw:problem:not_priced", "code": "not_priced"}
    world.provider.routes = world.provider.routes[1:]

    def free(request: httpx.Request) -> httpx.Response:
        kind = {"Content-Type": "application/problem+json"}
        return httpx.Response(409, json=problem, headers=kind)

    world.provider.script = [free]
    assert (await world.get("/item/a")).text == "free"
    assert world.money() == (1000, 0)


async def test_an_open_figure_is_asked_for_later(world: World) -> None:
    """While the figure is not final the maximum stays held; closing brings the true charge."""
    world.provider.unfinished, world.provider.charge = True, 300
    world.provider.control_script = [world.provider.answer(503)] * 2
    answer = await world.get("/item/a")
    assert answer.extensions["x402mw_payment"].charge is None
    assert world.money() == (0, 1000)
    await world.close()
    assert world.money() == (300, 0)


async def test_what_is_held_is_asked_for_before_a_limit_refuses(world: World) -> None:
    """Calls whose charge can be learnt do not block others."""
    world.connect(limits=_limits(total="0.0025"))
    world.provider.unfinished, world.provider.charge = True, 300
    world.provider.control_script = [world.provider.answer(503)] * 4
    for _ in range(5):
        assert (await world.get("/item/a")).status_code == 200
    charged, held = world.money()
    assert charged + held <= 2500


def _limits(**more: Any) -> Any:
    from x402mw_client import Limits

    return Limits(**{"per_request": "0.01", "total": "1.00"} | more)


async def test_a_paid_call_is_never_signed_for_again(world: World) -> None:
    """Resumed long after it was settled and forgotten, a call raises instead of paying twice."""
    await warm(world)
    world.provider.script = [world.provider.lose_answer] * 4
    with pytest.raises(PaymentOutcomeUnknown) as unknown:
        await world.get("/item/a")
    await world.resume(unknown.value.handle)
    world.provider.rows.clear()
    world.clock.now += 1000
    with pytest.raises(PaidOutcomeGone):
        await world.resume(unknown.value.handle)
    assert (world.provider.ran, world.money()) == (2, (2000, 0))


async def test_a_late_retry_of_a_forgotten_call_is_held(world: World) -> None:
    """When the provider no longer knows a call that was lost, its amount stays held."""
    await warm(world)
    forgotten = world.provider.refusal(410, "forgotten")
    world.provider.script = [world.provider.lose_answer, forgotten]
    with pytest.raises(PaymentOutcomeUnknown):
        await world.get("/item/a")
    assert world.money() == (1000, 1000)
    world.provider.script = [forgotten]
    assert (await world.get("/item/b")).status_code == 410
    assert world.money() == (1000, 1000)


async def test_a_call_that_was_given_up_is_held_anew(world: World) -> None:
    """A dead call that was freed holds its amount again when it is resumed."""
    await warm(world)
    world.provider.script = [world.provider.lose_request] * 4
    with pytest.raises(PaymentOutcomeUnknown) as unknown:
        await world.get("/item/a")
    call = next(iter(world.session.calls.values()))
    world.wallet.state.purse.free(call)
    world.clock.now += 500
    world.provider.script = [world.provider.honest, world.provider.answer(200)]
    assert (await world.resume(unknown.value.handle)).text == "proxy"
    assert world.money() == (1000, 1000)
    assert len(seqs(world)) == 1


async def test_a_replaced_provider_that_sells_nothing_any_more(world: World) -> None:
    """If the new journal's provider answers unpaid, that answer is the call's."""
    await warm(world)
    world.provider.script = [world.provider.refusal(409, "journal_replaced")]
    world.provider.routes = world.provider.routes[1:]
    assert (await world.get("/item/a")).text == "free"
    assert world.money() == (1000, 0)

"""Two accounts of one session: mended when memory was lost, never misled, and closed well."""

import logging
from typing import Any

import httpx
import pytest

from tests.client.scripted import ORIGIN, route, sent_payment, sent_voucher
from tests.client.world import LIMITS, World
from tests.support import payments as p
from x402mw.core.amounts import ZERO, Atomic
from x402mw.core.errors import AccountsDiffer
from x402mw.core.strict import b64url_encode
from x402mw_client import Limits
from x402mw_client.answers import Word
from x402mw_client.sessions import State, Subject

pytestmark = pytest.mark.anyio


async def test_lost_memory_is_recovered(world: World) -> None:
    """A wallet rolled back to an older state adopts its own newer voucher, and goes on."""
    await world.get("/item/a")
    session = world.session
    before = (session.cumulative, session.charged, session.total_seen)
    for _ in range(3):
        await world.get("/item/a")
    session.cumulative, session.charged, session.total_seen = before
    assert (await world.get("/item/a")).text == "ran 5"
    assert world.money() == (5000, 0)
    assert session.state is State.OPEN


@pytest.mark.parametrize(
    "lie",
    [
        {"charged_total": "900000"},
        {"charged_total": "900000", "voucher": "own"},
        {"charged_total": "2000", "voucher": "forged"},
        {"charged_total": "0", "voucher": "higher"},
        {"charged_total": "9000", "open_total": "9000", "voucher": "higher"},
        {"charged_total": None, "voucher": "higher"},
    ],
    ids=["no proof", "old proof", "forged proof", "falling", "more than signed", "no figures"],
)
async def test_an_inflated_correction_is_not_believed(world: World, lie: dict[str, Any]) -> None:
    """Only our own signature above the highest we remember moves us; else signing stops."""
    await world.get("/item/a")
    await world.get("/item/a")
    session = world.session
    own = world.provider.best[session.id]
    forged = own[:72] + (3000).to_bytes(8, "big") + own[80:]
    proof = lie.pop("voucher", None)
    if proof is not None:
        lie["voucher"] = b64url_encode(forged if proof == "forged" else own)
    if proof == "higher":
        session.cumulative = session.total_seen = session.charged = Atomic(1000)
    before = session.charged
    world.provider.script = [
        world.provider.says(402, "refused", reason="cover", final=False, **lie)
    ]
    with pytest.raises(AccountsDiffer):
        await world.get("/item/a")
    with pytest.raises(AccountsDiffer):
        await world.get("/item/a")
    assert (session.charged, session.state) == (before, State.DIFFERS)
    assert len(world.signed) == 3


async def test_a_charge_above_the_maximum(world: World) -> None:
    """The answer is delivered, no more than the maximum is booked, and signing stops."""
    await world.get("/item/a")
    world.provider.script = [world.provider.says(200, "settled", charge=5000)]
    assert (await world.get("/item/a")).text == "said"
    assert world.money() == (2000, 0)
    with pytest.raises(AccountsDiffer):
        await world.get("/item/a")


async def test_a_total_above_the_sum_of_charges(world: World) -> None:
    """With nothing open, the largest total must be our own sum."""
    await world.get("/item/a")
    world.provider.script = [world.provider.says(200, "settled", charge=1000, charged_total="2001")]
    await world.get("/item/a")
    with pytest.raises(AccountsDiffer):
        await world.get("/item/a")


async def test_totals_that_overtake_each_other_are_fine(world: World) -> None:
    """Answers in any order never look like a difference: the largest total counts."""
    await world.get("/item/a")
    purse, session = world.wallet.state.purse, world.session
    subject = Subject("GET", ORIGIN, "/item/a", b"x" * 32, ORIGIN)
    calls = [purse.sign(session, session.offer, subject, None) for _ in range(3)]
    for call, total in zip(calls, ("4000", "2000", "3000"), strict=True):
        assert call is not None
        word = Word("settled", "", True, Atomic(1000), "", Atomic(int(total)), Atomic(0))
        purse.settle(call[0], 1000, word)
    assert (session.charged, session.state) == (4000, State.OPEN)


# The end of a session.


async def test_closing_returns_the_rest(world: World) -> None:
    """Closing the transport closes the session at the provider; the receipt is checked."""
    await world.get("/item/a")
    await world.close()
    assert world.session.state is State.CLOSED
    assert world.escrow.count("/close") == 0
    assert world.wallet.summary().paid == "0.001"


@pytest.mark.parametrize("cause", ["away", "gone", "foreign", "forged", "inflated"])
async def test_closing_without_the_provider(
    world: World, cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    """If the provider does not close properly, the escrow does."""
    caplog.set_level(logging.CRITICAL, "x402mw.client")
    await world.get("/item/a")
    account = world.provider.accounts[world.session.id]
    inflated = p.replace(account, charged=Atomic(5000))

    def away(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("away")

    def closed_with(receipt: str) -> Any:
        return lambda request: httpx.Response(200, json={"receipt": receipt})

    receipt, session = world.provider.receipt, world.session.id
    world.provider.control_script = [
        {
            "away": away,
            "gone": world.provider.answer(404),
            "foreign": closed_with(receipt(b"x" * 16, account, final=True)),
            "forged": closed_with(receipt(session, account, final=True, seed=p.BUYER)),
            "inflated": closed_with(receipt(session, inflated, final=True)),
        }[cause]
    ]
    await world.close()
    assert world.escrow.count("/close") == 1
    assert world.money() == (1000, 0)


async def test_a_close_that_takes_time(world: World) -> None:
    """202 with `Retry-After` is asked again, with a fresh seq."""
    await world.get("/item/a")
    world.provider.control_script = [world.provider.answer(202, Retry_After="0")] * 2
    await world.close()
    asked = [r for r in world.provider.requests if r.url.path == p.QUOTE.control]
    assert len({sent_voucher(request).voucher.seq for request in asked}) == 3
    assert world.session.state is State.CLOSED


async def test_a_call_nobody_waited_for_is_asked_for(world: World) -> None:
    """A held call is learnt by control; one that never came is freed once it is dead."""
    world.connect(Limits(per_request="0.01", total="0.0025"))
    for action in (world.provider.answer(200, serve=True), world.provider.answer(200)):
        world.provider.script = [action]
        await world.get("/item/a")
    assert world.money() == (0, 2000)
    with pytest.raises(Exception, match="total"):
        await world.get("/other/a")
    assert world.money() == (1000, 1000)
    world.clock.now += 421
    assert (await world.get("/item/a")).text == "ran 2"
    assert world.money() == (2000, 0)


async def test_lost_sessions_are_closed_on_demand(world: World) -> None:
    """Sessions whose keys are gone are found through the account, and their rest returns."""
    await world.get("/item/a")
    world.connect()
    await world.get("/item/a")
    wallet = world.wallet
    if world.kind == "async":
        assert await wallet.close_lost_sessions() == 1
    else:
        assert wallet.close_lost_sessions_sync() == 1
    assert [s["status"] for s in world.escrow.sessions.values()] == ["closing", "locked"]


async def test_events_tell_no_secrets(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """The log names amounts, sessions and URLs, but no key, token, voucher or query."""
    caplog.set_level(logging.DEBUG, "x402mw.client")
    paid: list[Any] = []
    world.connect(LIMITS, on_payment=paid.append)
    await world.get("/item/a?key=hidden")
    text = caplog.text + repr(world.wallet) + repr(paid) + repr(world.session)
    assert "paid 0.001" in text
    assert [event.charge for event in paid] == [1000]
    payment = sent_payment(world.signed[0]).payload
    secrets = ("hidden", "pf_live", payment.token, payment.voucher, world.session.seed.hex())
    assert not [secret for secret in secrets if secret in text]


async def test_a_metered_route(world: World) -> None:
    """A metered call holds its maximum, and costs what was used."""
    world.provider.routes = [route("GET", "/item/{name}", 8000)]
    world.provider.charge = 14
    await world.get("/item/a")
    assert world.money() == (14, 0)


async def test_what_was_open_when_memory_was_lost(world: World) -> None:
    """The open total of an adopted correction stays held until the provider shows none open."""
    await world.get("/item/a")
    session = world.session
    before = (session.cumulative, session.charged, session.total_seen)
    for _ in range(3):
        await world.get("/item/a")
    session.cumulative, session.charged, session.total_seen = before
    account = world.provider.accounts[session.id]
    running = p.replace(account, charged=Atomic(3000), reserved=Atomic(1000))
    world.provider.accounts[session.id] = running
    world.clock.now += 1
    assert (await world.get("/item/a")).text == "ran 5"
    assert world.money() == (4000, 1000)
    settled = p.replace(world.provider.accounts[session.id], charged=Atomic(4700), reserved=ZERO)
    world.provider.accounts[session.id] = settled
    await world.get("/item/a")
    assert (world.money(), session.state) == ((5700, 0), State.OPEN)

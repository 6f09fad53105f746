"""Hostile providers: what they say, send and hold back costs a bounded amount of money and time."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from tests.client.scripted import route
from tests.client.world import LIMITS, World
from x402mw.core.errors import (
    AccountsDiffer,
    InsecureOrigin,
    LimitExceeded,
    PaymentOutcomeUnknown,
    PaymentRefused,
)
from x402mw_client import bodies, flow
from x402mw_client.escrow import AsyncEscrowClient, EscrowClient
from x402mw_client.secure import check_secure
from x402mw_client.steps import Sleep

pytestmark = pytest.mark.anyio


def drip(chunk: bytes, chunks: int, given: list[int]) -> Any:
    """A body that comes slowly, or never ends; `given` counts its chunks."""

    class Body(httpx.AsyncByteStream, httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            while len(given) < chunks:
                given.append(1)
                time.sleep(0.005)
                yield chunk

        async def __aiter__(self) -> AsyncIterator[bytes]:
            while len(given) < chunks:
                given.append(1)
                await asyncio.sleep(0.005)
                yield chunk

    return Body()


@pytest.fixture(autouse=True)
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between sendings, which take no time here; reading has 50 ms."""
    found: list[float] = []

    def pause(seconds: float) -> Sleep:
        found.append(seconds)
        return Sleep(0)

    monkeypatch.setattr(flow, "Sleep", pause)
    monkeypatch.setattr(bodies, "DRAIN_SECONDS", 0.05)
    return found


# Money.


async def test_a_total_holds_against_a_provider_that_ends_sessions(world: World) -> None:
    """What was signed in a session that is over may still be redeemed, and counts in full."""
    world.connect(replace(LIMITS, total="0.005"))
    world.provider.script = [
        world.provider.refusal(402, "session_closing", final=True) for _ in range(100)
    ]
    for _ in range(10):
        with pytest.raises((PaymentRefused, LimitExceeded)):
            await world.get("/item/a")
    sessions = world.wallet.state.purse.sessions.values()
    assert sum(session.cumulative for session in sessions) <= 5000


async def test_a_call_moves_to_another_session_once(world: World) -> None:
    """A provider that ends each session it gets locks at most two deposits per call."""
    world.provider.script = [
        world.provider.refusal(402, "session_closing", final=True) for _ in range(9)
    ]
    with pytest.raises(PaymentRefused, match="session_closing"):
        await world.get("/item/a")
    assert len(world.escrow.sessions) == 2


async def test_only_one_form_can_have_been_admitted(world: World) -> None:
    """A provider that names one form after the other is believed once."""
    world.provider.routes = [route("GET", "/item/{name}", 1000)]
    await world.get("/item/a")
    call: list[Any] = []

    def other(request: httpx.Request) -> httpx.Response:
        call[:] = world.session.calls.values()
        sent = world.provider.asked(request).commitment
        forms = [bytes.fromhex(form.signed.commitment_id) for form in call[0].forms]
        named = next(form for form in forms if form != sent)
        return world.provider.says(409, "settled", reason="seq_used", commitment=named)(request)

    def fresh(request: httpx.Request) -> httpx.Response:
        world.clock.now += 1
        return world.provider.refusal(402, "terms")(request)

    world.provider.script = [fresh, *[other] * 50]
    with pytest.raises(AccountsDiffer):
        await world.get("/item/a")
    assert len(world.signed) <= 5


async def test_a_final_receipt_that_closed_nothing(world: World) -> None:
    """Who signs a final receipt but leaves the money locked is overruled: the escrow closes."""
    await world.get("/item/a")
    world.provider.settle_at_escrow = lambda session, charged: None
    await world.close()
    assert world.escrow.count("/close") == 1
    assert [session["status"] for session in world.escrow.sessions.values()] == ["closing"]


async def test_a_final_receipt_below_what_was_taken(world: World) -> None:
    """What counts as spent is what the escrow paid out, whatever the receipt says."""
    world.provider.charge = 100
    await world.get("/item/a")
    settle = world.provider.settle_at_escrow
    world.provider.settle_at_escrow = lambda session, charged: settle(session, 1000)
    await world.close()
    assert world.money() == (1000, 0)


async def test_slow_control_answers_hold_nobody_up(world: World) -> None:
    """Other calls wait a bounded time for what one provider knows of its doubtful calls."""
    world.connect(replace(LIMITS, total="0.012"))
    world.provider.script = [world.provider.answer(200)] * 12
    for _ in range(12):
        await world.get("/item/a")
    asked: list[int] = []

    def slowly(request: httpx.Request) -> httpx.Response:
        asked.append(1)
        world.clock.now += 4
        return httpx.Response(503)

    world.provider.control_script = [slowly] * 50
    with pytest.raises(LimitExceeded):
        await world.get("/item/a")
    assert len(asked) <= 3


# Time.


async def test_running_for_ever(world: World, slept: list[float]) -> None:
    """Terms may allow a call of a century; nobody waits for it that long."""
    world.provider.routes = [route("GET", "/item/{name}", 1000, timeout_seconds=2**32 - 1)]
    await world.get("/item/a")
    running = world.provider.says(409, "running", reason="running", final=False)

    def later(request: httpx.Request) -> httpx.Response:
        answer = running(request)
        answer.headers["Retry-After"] = "60"
        return answer

    world.provider.script = [later] * 1000
    with pytest.raises(PaymentOutcomeUnknown, match="in time"):
        await world.get("/item/a")
    assert sum(slept) <= 600


async def test_a_proxys_retry_after(world: World, slept: list[float]) -> None:
    """`Retry-After` of anybody is followed within the caller's timeout."""
    await world.get("/item/a")
    away = world.provider.answer(503, Retry_After="50")
    world.provider.script = [away, away]
    assert (await world.get("/item/a", timeout=5)).text == "ran 2"
    assert 0 < sum(slept) <= 6


@pytest.mark.parametrize("chunk", [b"x", b"x" * 65_536], ids=["slow", "big"])
async def test_a_control_answer_without_end(world: World, chunk: bytes) -> None:
    """A control answer is read for some seconds and to 64 KiB, and then is none."""
    await world.get("/item/a")
    given: list[int] = []
    body = drip(chunk, 500, given)
    world.provider.control_script = [lambda request: httpx.Response(200, stream=body)]
    await world.close()
    assert len(given) < 20
    assert world.escrow.count("/close") == 1


async def test_terms_with_a_body_without_end(world: World) -> None:
    """Of a 402 that teaches the price no more is read than that."""
    given: list[int] = []
    body = drip(b"x", 500, given)
    honest = world.provider.honest

    def answer(request: httpx.Request) -> httpx.Response:
        found = honest(request)
        if found.status_code != 402:
            return found
        del found.headers["content-length"]
        return httpx.Response(402, headers=found.headers, stream=body)

    world.provider.honest = answer  # type: ignore[method-assign]
    assert (await world.get("/item/a")).text == "ran 1"
    assert len(given) < 20


@pytest.mark.parametrize("field", ["Transfer-Encoding", "Content-Encoding"])
async def test_only_what_is_short_is_read(world: World, field: str) -> None:
    """An answer that only says it is short goes to the caller unread."""
    await world.get("/item/a")
    given: list[int] = []
    found = {
        "Content-Type": "application/problem+json",
        "Content-Length": "20",
        field: "chunked" if field.startswith("T") else "identity",
    }
    body = drip(b"x" * 1000, 500, given)
    world.provider.script = [lambda request: httpx.Response(409, headers=found, stream=body)]
    request = world.http.build_request("GET", "http://127.0.0.1:8402/item/a")
    answer = world.http.send(request, stream=True)
    if world.kind == "async":
        answer = await answer
    assert (answer.status_code, len(given)) == (409, 0)


# Names.


@pytest.mark.parametrize(
    "url",
    [
        "http://127.evil.example",
        "http://127.0.0.1.evil.example",
        "http://localhost.evil.example",
        "http://127.0.0.1@evil.example",
        "http://localhost:80@evil.example",
        "http://evil.example#@127.0.0.1",
        "http://127.1",
        "http://0x7f.0.0.1",
        "http://127.0.0.1.",
        "http://0.0.0.0",
        "http://[::]",
        "http://[::ffff:1.2.3.4]",
        "ftp://127.0.0.1",
        "ws://localhost",
    ],
)
def test_what_only_looks_like_this_machine(url: str) -> None:
    """Plain http goes to literal loopback addresses and `localhost`, spelt in no other way."""
    with pytest.raises(InsecureOrigin):
        check_secure(httpx.URL(url))


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:1", "http://127.8.9.10", "http://LOCALHOST", "http://[::1]:8", "https://a"],
)
def test_what_is_this_machine_or_encrypted(url: str) -> None:
    """Loopback and https may be paid."""
    assert check_secure(httpx.URL(url))


# What is not theirs to see.


async def test_secrets_stay_where_they_belong(world: World) -> None:
    """No cookie, authorization or API key of anyone travels to control, nor ours to a provider."""
    seen: list[httpx.Request] = []
    escrow = world.escrow.__call__
    world.wallet._handler = lambda request: (seen.append(request), escrow(request))[1]
    secret = {"Authorization": "Bearer mine", "Cookie": "a=mine"}
    world.http.headers.update(secret)
    await world.get("/item/a")
    await world.close()
    control = [r for r in world.provider.requests if r.url.path.endswith("control")]
    assert not [r for r in control if "mine" in str(r.headers.raw)]
    assert not [r for r in world.provider.requests if "pf_live" in str(r.headers.raw)]
    assert not [r for r in seen if "mine" in str(r.headers.raw)]
    assert "mine" in str(world.signed[0].headers.raw)


async def test_a_plain_escrow_is_never_asked_through_a_proxy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The API key goes to this very machine in the clear, or encrypted to the escrow."""
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:8080")
    monkeypatch.setenv("ALL_PROXY", "http://proxy.example:8080")
    for url in ("http://127.0.0.1:8401", "http://localhost:8401"):
        for client in (AsyncEscrowClient(url)._client, EscrowClient(url)._client):
            assert not [pool for pool in client._mounts.values() if pool is not None]


async def test_forms_show_no_voucher(world: World) -> None:
    """What is printed by accident holds no signature."""
    world.provider.script = [world.provider.answer(200)]
    await world.get("/item/a")
    [call] = world.session.calls.values()
    text = repr(call) + repr(call.forms) + repr(world.session)
    assert call.forms[0].signed.wire not in text
    assert call.forms[0].signed.signature.hex() not in text
    assert repr(call.forms[0].signed.signature) not in text


async def test_a_reason_counts_only_with_its_status(world: World) -> None:
    """A 200 that names a replaced journal moves no second session to pay: the answer stands."""
    await world.get("/item/a")
    told = world.provider.says(200, "settled", reason="journal_replaced")
    world.provider.script = [told]
    assert (await world.get("/item/a")).status_code == 200
    assert len(world.escrow.sessions) == 1

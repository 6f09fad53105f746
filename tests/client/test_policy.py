"""What a buyer pays for at all: limits, whose offers, which origins, which bodies."""

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from tests.client.scripted import ESCROW, route, sent_payment
from tests.client.world import World
from tests.support import payments as p
from x402mw.core.errors import (
    BodyNotReplayable,
    EscrowUnavailable,
    InsecureOrigin,
    LimitExceeded,
    PaymentOutcomeUnknown,
    TokenRefused,
)
from x402mw.core.strict import b64url_encode
from x402mw.core.terms import write_requirements
from x402mw_client import Limits

pytestmark = pytest.mark.anyio


def limits(**more: str) -> Limits:
    """Limits that only what is named here can break."""
    return Limits(**{"per_request": "0.50", "total": "1.00"} | more)


async def refused(world: World, limit: str, path: str = "/item/a") -> None:
    """Checks that a call breaks this limit, having signed nothing for it."""
    before = len(world.signed)
    with pytest.raises(LimitExceeded) as error:
        await world.get(path)
    assert error.value.limit == limit
    assert len(world.signed) == before


async def test_per_request(world: World) -> None:
    """A call that may cost more than `per_request` is refused before anything is locked."""
    world.connect(limits(per_request="0.001"))
    await refused(world, "per_request", "/other/a")
    assert not world.escrow.sessions
    assert (await world.get("/item/a")).status_code == 200


async def test_total(world: World) -> None:
    """All charges and holds stay within `total`, with what an ended session left signed."""
    world.connect(limits(total="0.0035"))
    await world.get("/item/a")
    world.provider.script = [world.provider.refusal(402, "session_closing", final=True)]
    await world.get("/item/a")
    assert len(world.escrow.sessions) == 2
    await refused(world, "total")


async def test_session_limit(world: World) -> None:
    """One session costs at most `session`."""
    world.connect(limits(session="0.002"))
    await world.get("/item/a")
    await world.get("/item/a")
    await refused(world, "session")


async def test_deposit(world: World) -> None:
    """A call that the wallet's deposit cannot cover locks nothing."""
    world.provider.routes = [route("GET", "/item/{name}", 300_000)]
    world.connect(limits(), deposit="0.20")
    await refused(world, "deposit")
    assert not world.escrow.sessions


async def test_max_open_waits_for_what_is_open(world: World) -> None:
    """A call beyond `max_open` waits its turn; alone it may always go."""
    world.connect(limits(max_open="0.001"))
    assert (await world.get("/other/a")).status_code == 200
    world.provider.script = [world.provider.answer(200)]
    await world.get("/item/a")
    assert world.money() == (2000, 1000)
    world.clock.now += 421
    assert (await world.get("/item/a")).text == "ran 2"
    assert world.money() == (3000, 0)


async def test_a_402_of_others_is_returned_untouched(world: World) -> None:
    """Offers for other schemes, networks, escrows or nobody are not ours to pay."""
    ours = world.provider.offers()[0].accepts
    extra = ours["extra"]
    others: list[dict[str, Any]] = [
        ours | {"scheme": "exact"},
        ours | {"network": "eip155:8453"},
        ours | {"network": "escrow:other"},
        ours | {"asset": "EURC"},
        ours | {"amount": "0"},
        ours | {"amount": 1000},
        ours | {"payTo": "ag_" + "0f" * 16},
        ours | {"extra": extra | {"escrow": "https://escrow.evil"}},
        ours | {"extra": extra | {"terms": "0" * 64}},
        ours | {"extra": extra | {"route": "GET /elsewhere"}},
        ours | {"extra": extra | {"route": "POST /item/{name}"}},
        ours | {"extra": extra | {"control": "https://evil/control"}},
        ours | {"extra": extra | {"binding": 2}},
        ours | {"extra": extra | {"note": "x" * 2000}},
        ours | {"extra": 7},
        {},
    ]
    world.provider.honest = lambda request: world.provider.required(others)  # type: ignore[method-assign]
    answer = await world.get("/item/a")
    assert answer.status_code == 402
    assert "PAYMENT-REQUIRED" in answer.headers
    assert not world.signed
    assert not world.escrow.sessions


@pytest.mark.parametrize("control", ["https://evil/c", "//evil/c", "/c?x=1", "c", "/c\\x"])
async def test_a_control_path_stays_on_its_origin(world: World, control: str) -> None:
    """`control` is a plain path; an offer with anything else is not taken."""
    terms = replace(world.provider.routes[0], control=control)
    offer = write_requirements(terms, escrow=ESCROW, suggested_deposit=p.Atomic(0))
    world.provider.honest = lambda request: world.provider.required([offer])  # type: ignore[method-assign]
    assert (await world.get("/item/a")).status_code == 402


@pytest.mark.parametrize(
    "header", ["", "!", "e30=", "A" * 40_000], ids=["empty", "no base64", "no terms", "oversized"]
)
async def test_a_garbled_402_is_returned_untouched(world: World, header: str) -> None:
    """Terms that cannot be read are nobody's."""

    def garbled(request: httpx.Request) -> httpx.Response:
        return httpx.Response(402, headers={"PAYMENT-REQUIRED": header}, text="pay")

    world.provider.honest = garbled  # type: ignore[method-assign]
    assert (await world.get("/item/a")).text == "pay"


async def test_the_first_sound_offer_is_chosen_and_echoed(world: World) -> None:
    """Of several ways to pay, the provider's first that is ours; `accepted` is its very words."""
    ours = world.provider.offers()[0].accepts
    first = ours | {"scheme": "exact"}
    ours = ours | {"extra": ours["extra"] | {"more": ["kept", {"as": "it is"}]}, "newField": "x"}

    def offer(request: httpx.Request) -> httpx.Response:
        if "PAYMENT-SIGNATURE" in request.headers:
            return world.provider._serve(request, world.provider.offers()[0])
        return world.provider.required([first, ours])

    world.provider.honest = offer  # type: ignore[method-assign]
    assert (await world.get("/item/a")).text == "ran 1"
    assert sent_payment(world.signed[0]).accepted == ours


async def test_no_payment_over_plain_http(world: World) -> None:
    """Payment goes over https, or stays on this machine."""
    with pytest.raises(InsecureOrigin):
        await world.send("GET", "http://api.example.com/item/a")
    assert (await world.send("GET", "https://api.example.com/item/a")).text == "ran 1"
    assert len(world.signed) == 1


async def test_no_payment_after_a_redirect_to_another_origin(world: World) -> None:
    """Following a redirect, the caller never agreed to pay where it leads."""
    other = "https://other.example"

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/elsewhere":
            return httpx.Response(307, headers={"Location": f"{other}/item/a"})
        if request.url.path == "/here":
            return httpx.Response(307, headers={"Location": "/item/a"})
        return honest(request)

    honest = world.provider.honest
    world.provider.honest = answer  # type: ignore[method-assign]
    assert (await world.get("/elsewhere")).status_code == 402
    assert not world.signed
    assert (await world.get("/here")).text == "ran 1"
    assert (await world.get("/elsewhere")).status_code == 402
    assert {request.url.host for request in world.signed} == {"127.0.0.1"}


async def test_a_payment_of_the_callers_own_passes(world: World) -> None:
    """Who pays by other means is left alone."""
    world.provider.script = [world.provider.answer(200)]
    found = {"PAYMENT-SIGNATURE": "mine"}
    assert (await world.send("GET", "/item/a", headers=found)).text == "proxy"
    assert world.signed[0].headers["PAYMENT-SIGNATURE"] == "mine"


async def test_head_is_priced_as_get(world: World) -> None:
    """A HEAD uses what a GET learnt, and signs for HEAD."""
    await world.get("/item/a")
    assert (await world.send("HEAD", "/item/b")).status_code == 200
    assert (len(world.provider.requests), world.money()) == (3, (2000, 0))


@pytest.mark.parametrize("target", ["/item/a?x=1&y=%20", "/item/%C3%A4", "/item/a?", "/item/a;b=1"])
async def test_the_target_is_signed_as_sent(world: World, target: str) -> None:
    """Path and query are bound byte for byte; a lone question mark is none."""
    assert (await world.get(target)).text == "ran 1"


# The escrow is the one that was configured.


async def test_the_root_key_may_be_given(world: World) -> None:
    """With another root key than the configured one, nothing is paid."""
    world.connect(escrow_root=b64url_encode(p.SIGNER_KEY))
    with pytest.raises(TokenRefused):
        await world.get("/item/a")
    world.connect(escrow_root=b64url_encode(p.ROOT_KEY))
    assert (await world.get("/item/a")).text == "ran 1"


async def test_an_alias_of_the_escrow_is_known(world: World) -> None:
    """Another URL of the configured escrow is a matter of configuration."""
    world.provider.escrow = "https://escrow.internal/"
    assert (await world.get("/item/a")).status_code == 402
    world.connect(escrow_aliases=["https://escrow.internal"])
    assert (await world.get("/item/a")).text == "ran 1"


async def test_the_escrow_away_at_first(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the escrow no session opens; the caller is told, and later it works."""
    monkeypatch.setattr("x402mw_client.operations.PAUSES_SECONDS", (0.0,))
    world.escrow.away = True
    with pytest.raises(EscrowUnavailable):
        await world.get("/item/a")
    world.escrow.away = False
    assert (await world.get("/item/a")).text == "ran 1"


# Bodies.


class Numbers(httpx.AsyncByteStream, httpx.SyncByteStream):
    """A body that can be read once."""

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks

    def __iter__(self) -> Iterator[bytes]:
        while self.chunks:
            self.chunks -= 1
            yield b"0123456789"

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self:
            yield chunk


def body(world: World, chunks: int) -> Any:
    """The same for the transport in use."""
    stream = Numbers(chunks)
    return aiter(stream) if world.kind == "async" else iter(stream)


async def test_bytes_are_bound(world: World) -> None:
    """The provider sees the very body that was signed."""
    assert (await world.send("POST", "/echo", json={"a": 1})).text == "ran 1"
    assert json.loads(world.signed[0].content) == {"a": 1}


async def test_a_short_stream_is_read_and_replayed(world: World) -> None:
    """A stream up to `buffer_limit` is sent as often as needed."""
    assert (await world.send("POST", "/echo", content=body(world, 3))).text == "ran 1"
    world.provider.script = [world.provider.lose_answer]
    assert (await world.send("POST", "/echo", content=body(world, 3))).text == "ran 2"
    assert {request.content for request in world.signed} == {b"0123456789" * 3}


async def test_a_long_stream_goes_where_the_route_allows(world: World) -> None:
    """Beyond the limit, with known terms: unbound if allowed, else refused before sending."""
    world.connect(buffer_limit=20)
    await world.send("POST", "/upload", content=b"first")
    await world.send("POST", "/echo", content=b"first")
    before = len(world.provider.requests)
    with pytest.raises(BodyNotReplayable):
        await world.send("POST", "/echo", content=body(world, 5))
    assert len(world.provider.requests) == before
    await world.send("POST", "/upload", content=body(world, 5))
    last = world.signed[-1]
    assert (sent_payment(last).payload.binding, last.content) == (1, b"0123456789" * 5)
    assert world.money() == (3000, 0)


async def test_a_long_stream_to_an_unknown_route(world: World) -> None:
    """It is sent as it is, for the route may be free; if it is not, nothing is paid."""
    world.connect(buffer_limit=20)
    with pytest.raises(BodyNotReplayable):
        await world.send("POST", "/echo", content=body(world, 5))
    assert not world.signed
    assert (await world.send("POST", "/free", content=body(world, 5))).text == "free"
    assert world.provider.requests[-1].content == b"0123456789" * 5


@pytest.mark.parametrize("kind", ["terms", "lost", "busy", "replaced"])
async def test_a_long_stream_is_never_sent_twice(world: World, kind: str) -> None:
    """What cannot be repeated is given up, with its outcome unknown."""
    world.connect(buffer_limit=20)
    await world.send("POST", "/upload", content=b"first")
    provider = world.provider
    provider.script = [
        {
            "terms": provider.refusal(402, "terms"),
            "lost": provider.lose_answer,
            "busy": provider.says(503, "refused", reason="clock", final=False),
            "replaced": provider.refusal(409, "journal_replaced"),
        }[kind]
    ]
    before = len(provider.requests)
    with pytest.raises(PaymentOutcomeUnknown):
        await world.send("POST", "/upload", content=body(world, 5))
    assert len(provider.requests) == before + 1

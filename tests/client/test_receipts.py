"""Receipts every so many calls: asked for beside the calls, checked, kept, and never a loop."""

import threading
from typing import Any

import httpx
import pytest

from tests.client.world import LIMITS, World
from tests.support import payments as p
from x402mw.core.amounts import Atomic
from x402mw_client import ReceiptRefused, SignedReceipt

pytestmark = pytest.mark.anyio


def connect(world: World, every: int | None = 3, **settings: Any) -> list[Any]:
    """A wallet that asks for receipts; returns what it hears."""
    heard: list[Any] = []
    world.connect(LIMITS, receipt_every=every, on_receipt=heard.append, **settings)
    return heard


async def settled(world: World) -> None:
    """Whatever was asked for beside the calls has been answered."""
    aside = world.transport._aside
    if world.kind == "async":
        await aside.aclose()
    else:
        aside.close()
        aside._thread = None


def asked(world: World) -> list[httpx.Request]:
    """The control requests."""
    return [r for r in world.provider.requests if r.url.path == p.QUOTE.control]


async def test_every_third_call(world: World) -> None:
    """After each third charged call the newest receipt is kept; it proves all before it."""
    heard = connect(world)
    for number in range(7):
        answer = await world.get(f"/item/{number}")
        await settled(world)
    assert [(r.charged, r.open, r.final) for r in heard] == [(3000, 0, False), (6000, 0, False)]
    paid = answer.extensions["x402mw_payment"]
    kept = world.wallet.receipt(paid.session)
    assert kept == heard[-1]
    assert isinstance(kept, SignedReceipt)
    assert (kept.session, kept.text.count(".")) == (world.session.name, 2)
    assert len(asked(world)) == 2
    assert world.money() == (7000, 0)


async def test_not_unless_wanted(world: World) -> None:
    """Without the option nobody is asked; at the end the final receipt is kept all the same."""
    heard = connect(world, None)
    for _ in range(5):
        await world.get("/item/a")
    await settled(world)
    assert (asked(world), heard, world.wallet.receipt(world.session.name)) == ([], [], None)
    await world.close()
    final = world.wallet.receipt(world.session.name)
    assert final is not None
    assert (final.charged, final.final) == (5000, True)


@pytest.mark.parametrize("cause", ["less", "more", "forged", "foreign", "none", "away", "quota"])
async def test_what_is_wrong_with_it(world: World, cause: str) -> None:
    """A refusal or a lie is told once, typed; nothing is kept, and paying goes on."""
    heard = connect(world)
    await world.get("/item/a")
    name = world.session.id

    def receipt(charged: int, session: bytes = name, seed: bytes = b"") -> Any:
        account = p.replace(world.provider.accounts[name], charged=Atomic(charged))
        signed = world.provider.receipt(session, account, final=False, seed=seed)
        return lambda request: httpx.Response(200, json={"receipt": signed})

    def away(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("away")

    world.provider.control_script = [
        {
            "less": receipt(2999),
            "more": receipt(3001),
            "forged": receipt(3000, seed=p.BUYER),
            "foreign": receipt(3000, session=b"x" * 16),
            "none": lambda request: httpx.Response(200, json={"receipt": 7}),
            "away": away,
            "quota": world.provider.answer(429),
        }[cause]
    ]
    for _ in range(3):
        await world.get("/item/a")
        await settled(world)
    assert [type(error) for error in heard] == [ReceiptRefused]
    assert heard[0].session == world.session.name
    assert world.wallet.receipt(world.session.name) is None
    assert (len(asked(world)), world.money()) == (1, (4000, 0))
    world.clock.now += 61
    for _ in range(2):
        await world.get("/item/a")
        await settled(world)
    assert (len(heard), heard[1].charged) == (2, 6000)


async def test_no_call_waits_for_it(world: World) -> None:
    """While a provider is slow to give its receipt, calls go on."""
    heard = connect(world, 1)
    slowly = world.provider.control

    def slow(request: httpx.Request) -> httpx.Response:
        assert world.kind == "async" or answered.wait(timeout=20)
        return slowly(request)

    answered = threading.Event()
    world.provider.control_script = [slow]
    await world.get("/item/a")
    assert not heard
    answered.set()
    await settled(world)
    assert len(heard) == 1


async def test_processes_share_the_count(world: World, tmp_path: Any) -> None:
    """The process that counts the last call of all of them asks, and the receipt is everybody's."""
    heard = connect(world, 4, path=tmp_path / "w.db")
    other = World(world.kind, world.clock)
    other.escrow, other.provider = world.escrow, world.provider
    heard_too = connect(other, 4, path=tmp_path / "w.db")
    for _ in range(4):
        for one in (world, other):
            await one.get("/item/a")
            await settled(one)
    assert [r.charged for r in (*heard, *heard_too)] == [4000, 8000]
    name = world.session.name
    assert world.wallet.receipt(name) == other.wallet.receipt(name)
    await settled(other)

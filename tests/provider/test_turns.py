"""Many payments at once never keep the event loop for long."""

import asyncio

import pytest

from x402mw.provider.turns import Turns

pytestmark = pytest.mark.anyio


async def test_a_turn_lets_only_its_share_through_in_order() -> None:
    """Between two turns of the loop at most so many calls go on, the first that came first."""
    turns, gone, counts = Turns(4), list[int](), list[int]()

    async def call(number: int) -> None:
        await turns.take()
        gone.append(number)

    calls = [asyncio.ensure_future(call(number)) for number in range(20)]
    while not all(one.done() for one in calls):
        before = len(gone)
        await asyncio.sleep(0)
        counts.append(len(gone) - before)
    assert gone == [*range(20)]
    assert max(counts) == 4


async def test_a_lone_call_does_not_wait() -> None:
    """A call that finds room goes on without giving up its turn."""
    turns, others = Turns(4), list[str]()
    asyncio.get_running_loop().call_soon(others.append, "ran")
    await turns.take()
    assert others == []


async def test_a_call_that_gave_up_holds_up_nobody() -> None:
    """A cancelled call leaves its place to the next."""
    turns = Turns(1)
    first, second, third = (asyncio.ensure_future(turns.take()) for _ in range(3))
    await asyncio.sleep(0)
    assert first.done()
    second.cancel()
    async with asyncio.timeout(10):
        await third
    assert second.cancelled()


async def test_room_comes_back() -> None:
    """Whatever a turn has used, the next one has its whole share again."""
    turns = Turns(2)
    for _ in range(5):
        await turns.take()
        await turns.take()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert turns._left == 2

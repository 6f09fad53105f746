"""Several wallets on one file, as the processes of one agent have: one set of books and limits."""

import asyncio
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.client.scripted import ORIGIN
from tests.client.test_interruptions import slow
from tests.client.world import LIMITS, World
from tests.support import payments as p
from x402mw.core.errors import (
    AccountsDiffer,
    ConfigurationError,
    LimitExceeded,
    LocalError,
    PaymentOutcomeUnknown,
)
from x402mw.core.strict import b64url_encode
from x402mw_client import Limits, steps
from x402mw_client.closing import close_all
from x402mw_client.sessions import Call, Session, State, Subject

pytestmark = pytest.mark.anyio

SUBJECT = Subject("GET", ORIGIN, "/item/a", b"h" * 32, ORIGIN + "/item/a")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the wallet file is."""
    return tmp_path / "wallet.db"


@pytest.fixture
def pair(world: World, path: Path) -> tuple[World, World]:
    """Two wallets on one file, in one market."""
    world.connect(path=path)
    return world, partner(world, path=path)


def partner(world: World, limits: Limits = LIMITS, **settings: Any) -> World:
    """Another process in the same market."""
    other = World(world.kind, world.clock)
    other.escrow, other.provider = world.escrow, world.provider
    other.connect(limits, **settings)
    return other


def sign(world: World, session: Session) -> tuple[Call, Any]:
    """Signs one call, as if it were sent; the session is the partner's object."""
    world.wallet.state.purse.look()
    own = world.wallet.state.purse.sessions[session.id]
    signed = world.wallet.state.purse.sign(own, own.offer, SUBJECT, None)
    assert signed is not None
    return signed


async def end(world: World) -> None:
    """What closing the transport does, which may be used again here."""
    ended = world.transport._driver.run(close_all(world.wallet.state))
    if world.kind == "async":
        await ended


@contextmanager
def stuck(path: Path) -> Iterator[None]:
    """Another process has stopped in the middle of a change."""
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        db.close()


async def test_one_session_for_all(pair: tuple[World, World]) -> None:
    """Both pay from one session, under one pinned key, and both know what both have spent."""
    for number in range(3):
        for world in pair:
            assert (await world.get(f"/item/{number}")).status_code == 200
    escrow = pair[0].escrow
    assert (len(escrow.sessions), escrow.count("/x402mw-keys")) == (1, 1)
    for world in pair:
        assert (world.money(), world.wallet.spent) == ((6000, 0), 6000)
        assert (world.session.state, world.wallet.summary().paid) == (State.OPEN, "0.006")


async def test_one_limit_for_all(world: World, path: Path) -> None:
    """The total counts what the others spent and hold."""
    limits = Limits(per_request="0.01", total="0.0035")
    world.connect(limits, path=path)
    other = partner(world, limits, path=path)
    await world.get("/item/a")
    await other.get("/item/a")
    call, _ = sign(other, world.session)
    with pytest.raises(LimitExceeded):
        await world.get("/item/a")
    other.wallet.state.purse.free(call)
    assert (await world.get("/item/a")).status_code == 200
    with pytest.raises(LimitExceeded):
        await other.get("/item/a")


async def test_one_max_open_for_all(world: World, path: Path) -> None:
    """What one holds open keeps another waiting for its turn, and no longer than that."""
    limits = Limits(per_request="0.01", total="1.00", max_open="0.001")
    world.connect(limits, path=path)
    other = partner(world, limits, path=path)
    await world.get("/item/a")
    call, _ = sign(world, world.session)
    other.wallet.state.purse.look()
    purse = other.wallet.state.purse
    assert purse.sign(other.session, other.session.offer, SUBJECT, None) is None
    later = threading.Timer(0.1, world.wallet.state.purse.settle, (call, 500))
    later.start()
    assert (await other.get("/item/a")).status_code == 200
    later.join()
    assert other.money() == (2500, 0)


async def test_one_session_is_opened(path: Path) -> None:
    """Whoever comes at the same moment waits for the one opening, in whatever process."""
    first = World("async")
    first.connect(path=path)
    worlds = [first, partner(first, path=path), partner(first, path=path)]
    for world in worlds:
        world.transport._escrow._client = httpx.AsyncClient(transport=slow(world.escrow, after=9))
    answers = await asyncio.gather(*(w.get("/item/a") for w in worlds for _ in range(5)))
    assert {answer.status_code for answer in answers} == {200}
    assert len(first.escrow.sessions) == 1
    assert first.money() == (15_000, 0)


async def test_one_renewal_and_one_top_up(pair: tuple[World, World]) -> None:
    """A token that one renewed, and a deposit that one topped up, are everybody's."""
    first, second = pair
    await first.get("/item/a")
    await second.get("/item/a")
    first.clock.now += 700
    for world in pair:
        await world.get("/item/a")
    assert first.escrow.count("/token") == 1
    for _ in range(60):
        for world in pair:
            await world.get("/item/a")
    assert first.escrow.count("/topup") == 1
    assert first.session.deposit == second.session.deposit > 100_000
    assert first.money() == second.money() == (124_000, 0)


async def test_calls_of_the_dead_are_asked_about(world: World, path: Path) -> None:
    """What a process held when it died is learnt by another one, once there is need."""
    limits = Limits(per_request="0.01", total="0.0025")
    world.connect(limits, path=path)
    other = partner(world, limits, path=path)
    await world.get("/item/a")
    world.provider.script = [world.provider.answer(200, serve=True)]
    await world.get("/item/a")
    world.wallet._memory.close()
    assert other.money() == (1000, 1000)
    with pytest.raises(LimitExceeded):
        await other.get("/item/a")
    assert other.money() == (2000, 0)


async def test_calls_of_the_living_are_left_alone(pair: tuple[World, World]) -> None:
    """A process that is slow or stopped keeps what it holds, however others need the room."""
    first, second = pair
    await first.get("/item/a")
    call, _ = sign(first, first.session)
    purse = second.wallet.state.purse
    for _ in range(3):
        purse.recover()
    assert not second.session.doubtful
    assert second.money() == (1000, 1000)
    first.clock.now += 10_000
    purse.recover()
    assert not second.session.doubtful
    first.wallet.state.purse.settle(call, 700)
    assert second.money() == (1700, 0)


async def test_a_call_that_was_given_up_is_everybodys(world: World, path: Path) -> None:
    """What its caller no longer waits for others may settle; resuming it books nothing twice."""
    limits = Limits(per_request="0.01", total="0.0015")
    world.connect(limits, path=path)
    other = partner(world, limits, path=path)
    world.provider.script = [world.provider.lose_answer] * 4
    with pytest.raises(PaymentOutcomeUnknown) as unknown:
        await world.get("/item/a")
    with pytest.raises(LimitExceeded):
        await other.get("/item/b")
    assert other.money() == (1000, 0)
    answer = await world.resume(unknown.value.handle)
    assert (answer.text, world.money(), other.money()) == ("ran 1", (1000, 0), (1000, 0))


async def test_what_others_settled_is_never_signed_anew(pair: tuple[World, World]) -> None:
    """If another process has closed the account of a call, no second voucher exists for it."""
    first, second = pair
    await first.get("/item/a")
    call, _ = sign(first, first.session)
    first.wallet.state.purse.leave(call)
    purse = second.wallet.state.purse
    purse.recover()
    purse.settle(second.session.doubtful[call.seq], 1000)
    session = first.session
    with pytest.raises(PaymentOutcomeUnknown, match="another process"):
        first.wallet.state.purse.sign(session, session.offer, SUBJECT, call)
    first.wallet.state.purse.settle(call, 1000)
    assert first.money() == (2000, 0)
    assert call.paid.charge == 1000


async def test_the_last_one_closes(pair: tuple[World, World]) -> None:
    """Who ends while others use the wallet leaves the sessions to them; the last one closes."""
    first, second = pair
    await first.get("/item/a")
    await second.get("/item/a")
    await end(first)
    assert second.session.state is State.OPEN
    assert (await second.get("/item/a")).text == "ran 3"
    await end(second)
    assert second.session.state is State.CLOSED
    assert second.wallet.spent == first.wallet.spent == 3000


async def test_both_end_at_once(pair: tuple[World, World]) -> None:
    """Of two that end, and still have the file, the second one closes: nobody is forgotten."""
    first, second = pair
    await first.get("/item/a")
    await end(second)
    assert first.session.state is State.OPEN
    await end(first)
    assert first.session.state is State.CLOSED
    # The one that ended goes on after all, with a session that it does not share with the past.
    assert (await second.get("/item/a")).status_code == 200
    assert len(first.escrow.sessions) == 2
    await end(first)
    assert second.session.state is State.OPEN


async def test_closed_by_another(pair: tuple[World, World]) -> None:
    """The books that one closed are closed: a late answer of another is in the final figure."""
    first, second = pair
    await first.get("/item/a")
    call, _ = sign(second, first.session)
    first.wallet.state.purse.close(first.session, 2000)
    second.wallet.state.purse.settle(call, 1000)
    assert second.money() == (2000, 0)
    assert call.paid.charge == 1000
    assert (await second.get("/item/a")).status_code == 200
    assert len(first.escrow.sessions) == 2
    assert first.wallet.spent == second.wallet.spent == 3000


async def test_accounts_that_differ_differ_for_all(pair: tuple[World, World]) -> None:
    """Where one process found a difference none of them signs."""
    first, second = pair
    await first.get("/item/a")
    await second.get("/item/a")
    first.wallet.state.purse.differ(first.session)
    with pytest.raises(AccountsDiffer):
        await second.get("/item/a")


async def test_totals_of_others_are_no_difference(pair: tuple[World, World]) -> None:
    """Answers of two processes that overtake each other never look like a difference."""
    first, second = pair
    await first.get("/item/a")
    calls = [sign(world, first.session)[0] for world in pair]
    answers = await first.get("/item/b"), await second.get("/item/b")
    assert {answer.status_code for answer in answers} == {200}
    for world, call in zip(pair, calls, strict=True):
        world.wallet.state.purse.free(call)
        assert (await world.get("/item/c")).status_code == 200
    assert first.session.state is second.session.state is State.OPEN
    assert first.money() == second.money() == (5000, 0)


async def test_another_pin_is_refused(pair: tuple[World, World], path: Path) -> None:
    """The root key that one process pinned holds for all."""
    first, second = pair
    await first.get("/item/a")
    pinned = first.wallet.sync_escrow()
    keys = pinned.keys()
    pinned.close_connections()
    with pytest.raises(ConfigurationError, match="another escrow"):
        partner(first, path=path, escrow_root=b64url_encode(p.SIGNER_KEY))
    second.wallet.state.pin(keys)
    assert second.wallet.state.network_id == p.NETWORK_ID


# A process that is stuck.


async def test_a_change_waits_for_others(pair: tuple[World, World], path: Path) -> None:
    """A call waits, blocking nobody, while another process is in the middle of a change."""
    first, _ = pair
    await first.get("/item/a")
    hold = stuck(path)
    hold.__enter__()
    later = threading.Timer(0.2, hold.__exit__, (None, None, None))
    later.start()
    assert (await first.get("/item/a")).status_code == 200
    later.join()
    assert first.money() == (2000, 0)


async def test_an_answer_never_waits(pair: tuple[World, World], path: Path) -> None:
    """What a call cost is booked later if it cannot be booked now; its answer is not kept back."""
    first, second = pair
    await first.get("/item/a")
    honest = first.provider.honest
    held: list[Any] = []

    def stop(request: httpx.Request) -> httpx.Response:
        held.append(stuck(path))
        held[0].__enter__()
        return honest(request)

    first.provider.script = [stop]
    assert (await first.get("/item/a")).text == "ran 2"
    held[0].__exit__(None, None, None)
    assert second.money() == (1000, 1000)
    assert (await first.get("/item/a")).text == "ran 3"
    assert second.money() == (3000, 0)


async def test_who_stays_stuck_is_told_of(
    pair: tuple[World, World], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that never comes back does not keep others waiting for ever."""
    monkeypatch.setattr(steps, "BUSY_SECONDS", 0.1)
    await pair[0].get("/item/a")
    with stuck(path), pytest.raises(LocalError, match="stuck"):
        await pair[1].get("/item/a")
    assert (await pair[1].get("/item/a")).status_code == 200

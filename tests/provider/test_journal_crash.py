"""A provider killed with SIGKILL loses nothing that was acknowledged, and charges nothing twice."""

import asyncio
import multiprocessing
import os
from collections import defaultdict
from multiprocessing.connection import Connection

import pytest

from tests.provider import journal_load
from tests.provider.journal_load import TOKENS
from tests.provider.journals import Clock, outcome
from tests.provider.places import execute
from tests.support.payments import QUOTE
from tests.support.postgresql import start_server
from x402mw.core.gate import CallState
from x402mw.core.pricing import rate
from x402mw.provider.journal import Journal, postgresql

KILLS = 20 if os.environ.get("X402MW_LONG") else 5
SERVER_KILLS = 10 if os.environ.get("X402MW_LONG") else 1
ACKS_FIRST, ACKS_MORE = 20, 97

Story = dict[tuple[bytes, int], dict[str, int]]
"""What was acknowledged of each call."""


def test_killed_at_any_moment(place: str) -> None:
    """Killed again and again under load: acknowledged charges stand, the rest is void or marked.

    The totals of every session are the sums of its calls, to the unit, metered ones included.
    """
    # One server process imports everything once; each run is a fresh process forked from it.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.provider.journal_load"])
    for number in range(KILLS):
        receiver, sender = processes.Pipe(duplex=False)
        process = processes.Process(target=journal_load.run, args=(place, number, sender))
        process.start()
        sender.close()
        story: Story = defaultdict(dict)
        for _ in range(ACKS_FIRST + number * ACKS_MORE):
            _hear(receiver, story)
        process.kill()
        process.join()
        while _hear(receiver, story):
            pass
        receiver.close()
        asyncio.run(_check_calls(place, story))
        _check_sums(place)


def test_a_killed_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The PostgreSQL server killed under load, all at once: what was acknowledged is there."""
    monkeypatch.setattr(postgresql, "FREE_ROUNDS", 1)
    server = start_server(durable=True)
    place = server.new_database()
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.provider.journal_load"])
    try:
        for number in range(SERVER_KILLS):
            receiver, sender = processes.Pipe(duplex=False)
            process = processes.Process(target=journal_load.run, args=(place, number, sender))
            process.start()
            sender.close()
            story: Story = defaultdict(dict)
            for _ in range(100 + 50 * number):
                _hear(receiver, story)
            server.kill()
            # It ends by itself: it is told that the journal is unavailable, and has no more to say.
            while _hear(receiver, story):
                pass
            process.join()
            receiver.close()
            server.start()
            asyncio.run(_check_calls(place, story))
            _check_sums(place)
    finally:
        server.remove()


def _hear(receiver: Connection, story: Story) -> bool:
    """Hears one acknowledgement; False when there will be no more."""
    try:
        what, session, seq, amount = receiver.recv()
    except (EOFError, OSError):
        return False
    story[session, seq][what] = amount
    return True


async def _check_calls(place: str, story: Story) -> None:
    """Reopens the journal, which settles what was left open, and compares it with the story."""
    journal = Journal.open(place, clock=Clock())
    for (session, seq), acks in story.items():
        call = await journal.lookup(session, seq)
        assert call is not None, "an acknowledged call is lost"
        assert call.state is CallState.SETTLED
        if "settled" in acks:
            assert call.charge == acks["settled"]
            assert call.outcome == outcome(b"%d" % seq)
        elif "marked" in acks and call.outcome is None:
            assert call.charge - TOKENS.base in (665, 666)
        elif "started" in acks and call.outcome is None:
            assert call.charge >= TOKENS.base
        elif "admitted" in acks and call.outcome is None and call.amount == QUOTE.amount:
            assert call.charge == 0, "an open call was charged"
    journal.close()


def _check_sums(place: str) -> None:
    charges = execute(place, "SELECT session, sum(charge) FROM calls GROUP BY session")
    sessions = execute(place, "SELECT id, charged FROM sessions WHERE reserved = 0")
    assert dict(charges) == dict(sessions)
    metered = execute(
        place,
        "SELECT terms, session, sum(charge), sum(CASE WHEN charge > 0 THEN 1 ELSE 0 END)"
        " FROM calls GROUP BY terms, session",
    )
    quantities = execute(place, "SELECT terms, session, quantity FROM meters")
    quantity_of = {(terms, session): quantity for terms, session, quantity in quantities}
    for terms, session, charged, calls in metered:
        if terms == TOKENS.id:
            growth = rate(TOKENS.unit_price, TOKENS.per, quantity_of[terms, session])
            assert charged == TOKENS.base * calls + growth

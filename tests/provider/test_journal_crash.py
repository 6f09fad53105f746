"""A provider killed with SIGKILL loses nothing that was acknowledged, and charges nothing twice."""

import asyncio
import multiprocessing
import sqlite3
from collections import defaultdict
from multiprocessing.connection import Connection
from pathlib import Path

from tests.provider import journal_load
from tests.provider.journal_load import TOKENS
from tests.provider.journals import Clock, outcome
from tests.support.payments import QUOTE
from x402mw.core.gate import CallState
from x402mw.core.pricing import rate
from x402mw.provider.journal import Journal

KILLS = 20
ACKS_FIRST, ACKS_MORE = 20, 23

Story = dict[tuple[bytes, int], dict[str, int]]
"""What was acknowledged of each call."""


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Killed twenty times under load: acknowledged charges stand, open is void, started is marked.

    The totals of every session are the sums of its calls, to the unit, metered ones included.
    """
    path = str(tmp_path / "journal.db")
    # One server process imports everything once; each run is a fresh process forked from it.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.provider.journal_load"])
    for number in range(KILLS):
        receiver, sender = processes.Pipe(duplex=False)
        process = processes.Process(target=journal_load.run, args=(path, number, sender))
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
        asyncio.run(_check_calls(path, story))
        _check_sums(path)


def _hear(receiver: Connection, story: Story) -> bool:
    """Hears one acknowledgement; False when there will be no more."""
    try:
        what, session, seq, amount = receiver.recv()
    except (EOFError, OSError):
        return False
    story[session, seq][what] = amount
    return True


async def _check_calls(path: str, story: Story) -> None:
    """Reopens the journal, which settles what was left open, and compares it with the story."""
    journal = Journal.open(path, clock=Clock())
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


def _check_sums(path: str) -> None:
    connection = sqlite3.connect(path)
    charges = connection.execute("SELECT session, sum(charge) FROM calls GROUP BY session")
    sessions = connection.execute("SELECT id, charged FROM sessions WHERE reserved = 0")
    assert dict(charges) == dict(sessions)
    metered = connection.execute(
        "SELECT session, sum(charge), sum(charge > 0) FROM calls WHERE terms = ? GROUP BY session",
        (TOKENS.id,),
    ).fetchall()
    for session, charged, calls in metered:
        (quantity,) = connection.execute(
            "SELECT quantity FROM meters WHERE session = ?", (session,)
        ).fetchone()
        growth = rate(TOKENS.unit_price, TOKENS.per, quantity)
        assert charged == TOKENS.base * calls + growth
    connection.close()

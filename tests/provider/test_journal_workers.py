"""Several worker processes on one journal: each call once, and the dead harm nobody for long."""

import asyncio
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from bench.journal import measure
from tests.provider.journal_worker import workers
from tests.provider.journals import Clock, admit, admitted, claim, outcome, session_id
from tests.support.payments import SESSION, TOKEN
from x402mw.core.amounts import Atomic
from x402mw.core.gate import CallState, Refused
from x402mw.provider.journal import Journal, Report

LONG = bool(os.environ.get("X402MW_LONG"))
pytestmark = pytest.mark.anyio


async def state(journal: Journal, seq: int) -> CallState | None:
    """The state of a call of the workers' session 1."""
    call = await journal.lookup(session_id(1), seq)
    return call and call.state


def test_one_header_at_all_workers_runs_once(place: str) -> None:
    """The same voucher, sent to three workers at the same time is admitted by one of them."""
    with workers(place, 0.1, 0.1, 0.1) as crowd:
        for seq in range(1, 30):
            for worker in crowd:
                worker.tell("admit", seq)
            answers = [worker.hear() for worker in crowd]
            assert answers.count("admitted") == 1
            assert answers.count("running") == 2


async def test_all_workers_get_their_turn(place: str) -> None:
    """Under load no worker starves, and afterwards all totals are the sums of the rows."""
    with workers(place, 0.1, 0.1, 0.1) as crowd:
        for worker in crowd:
            worker.tell("load", 1.0, 8)
        loads = [worker.hear() for worker in crowd]
    counts = [count for count, _ in loads]
    # A machine that is busy with other things may hold one of us up; to starve would be far more.
    assert min(counts) * 20 > max(counts)
    assert max(max(waits) for _, waits in loads) < 1
    journal = Journal.open(place, clock=Clock())
    assert journal.unredeemed == 1000 * sum(counts)
    journal.close()


@pytest.mark.skipif(not LONG, reason="measures, on a machine that is idle otherwise")
def test_nobody_waits_long(tmp_path: Path) -> None:
    """With four workers under load 99 of 100 batches wait less than 20 ms, and all below 200 ms."""
    _, waits = measure(str(tmp_path / "journal.db"), 4)
    assert waits[len(waits) * 99 // 100] < 20
    assert waits[-1] < 200


async def test_the_calls_of_a_killed_worker_are_settled(place: str) -> None:
    """What a killed worker left open is settled by another one that lives: void, or its mark."""
    with workers(place, 0.1, 0.1) as (first, second):
        for seq in (1, 2):
            assert first.ask("admit", seq) == "admitted"
        first.ask("start", 2, 70)
        assert second.ask("admit", 3) == "admitted"
        journal = Journal.open(place, clock=Clock())
        first.kill()
        with anyio.fail_after(15):
            while await state(journal, 1) is not CallState.SETTLED:
                await anyio.lowlevel.checkpoint()
        assert await state(journal, 3) is CallState.OPEN
        account = await journal.account(session_id(1))
        assert account is not None
        assert (account.charged, account.reserved) == (70, 1000)
        assert second.ask("settle", 3) == 1000
        journal.close()


async def test_the_calls_of_a_stopped_worker_are_left_alone(place: str) -> None:
    """However often others look, a worker that is stopped keeps its calls, and settles them."""
    with workers(place, 60, 0.05) as (first, second):
        assert first.ask("admit", 1) == "admitted"
        first.signal(signal.SIGSTOP)
        # Each answer comes after another round of the second one's.
        for seq in range(2, 12):
            assert second.ask("admit", seq) == "admitted"
            assert second.ask("settle", seq) == 1000
            await anyio.sleep(0.06)
        journal = Journal.open(place, clock=Clock())
        assert await state(journal, 1) is CallState.OPEN
        journal.close()
        first.signal(signal.SIGCONT)
        assert first.ask("settle", 1) == 1000


def test_a_worker_stopped_in_mid_batch(place: str) -> None:
    """Others are refused in bounded time while one is stopped in its turn; then all goes on."""
    with workers(place, 60, 60) as (first, second):
        first.tell("hold", 0.0)
        assert first.hear() == "holding"
        first.hear()
        first.tell("hold", 0.3)
        assert first.hear() == "holding"
        first.signal(signal.SIGSTOP)
        asked = time.monotonic()
        assert second.ask("admit", 1) == "JournalUnavailable"
        assert time.monotonic() - asked < 5
        first.signal(signal.SIGCONT)
        assert first.hear() == "held"
        assert second.ask("admit", 1) == "admitted"
        assert first.ask("admit", 2) == "admitted"
        assert second.ask("settle", 1) == first.ask("settle", 2) == 1000


def test_the_redeemer_has_a_successor(place: str) -> None:
    """Of several workers one redeems; when it dies another one does."""
    with workers(place, 0.1, 0.1, 0.1) as crowd:
        leaders = [worker for worker in crowd if worker.ask("leads")]
        assert len(leaders) == 1
        leaders[0].kill()
        rest = [worker for worker in crowd if worker is not leaders[0]]
        deadline = time.monotonic() + 15
        while not any(worker.ask("leads") for worker in rest):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert [worker.ask("leads") for worker in rest].count(True) == 1


async def test_kills_under_load(place: str) -> None:
    """Workers killed under load, one after the other, leave books whose sums are right."""
    for number in range(20 if LONG else 2):
        with workers(place, 0.1, 0.1) as (first, second):
            first.tell("load", 10.0, 8)
            second.tell("load", 0.4, 8)
            await anyio.sleep(0.05 * number % 0.4)
            first.kill()
            second.hear()
    journal = Journal.open(place, clock=Clock())
    accounts = [await journal.account(session_id(number)) for number in range(8)]
    assert sum(account.charged for account in accounts if account) == journal.unredeemed
    assert not any(account.reserved for account in accounts if account)
    journal.close()


# Two workers in one process: what one changes the other heeds.


async def test_a_replaced_identity_is_heeded_at_once(place: str) -> None:
    """When one worker learns that the book is a restored backup, no other admits old sessions."""
    first, second = Journal.open(place, clock=Clock()), Journal.open(place, clock=Clock())
    before = first.journal_id
    assert second.journal_id == before
    old = claim(1, token=replace(TOKEN, journal=before))
    assert await first.apply_verdicts([Report(SESSION, Atomic(1), Atomic(1), ended=False)])
    with pytest.raises(Refused) as refused:
        await admit(second, old)
    assert refused.value.reason == "journal_replaced"
    assert (second.journal_id, second.replaced) == (first.journal_id, {before})
    first.close()
    second.close()


async def test_a_replaced_identity_is_heeded_in_the_same_batch(place: str) -> None:
    """What stands behind the news in one and the same batch is judged by the news already."""
    journal = Journal.open(place, clock=Clock())
    old = claim(1, token=replace(TOKEN, journal=journal.journal_id))
    news = journal.apply_verdicts([Report(SESSION, Atomic(1), Atomic(1), ended=False)])
    answers = await asyncio.gather(news, admit(journal, old), return_exceptions=True)
    assert answers[0] is True
    assert isinstance(answers[1], Refused)
    assert answers[1].reason == "journal_replaced"
    journal.close()


async def test_settings_are_shared(place: str) -> None:
    """A setting that one worker keeps is what another reads, once that has done anything."""
    first, second = Journal.open(place, clock=Clock()), Journal.open(place, clock=Clock())
    await first.set_setting("key", "value")
    assert first.setting("key") == "value"
    await second.account(SESSION)
    assert second.setting("key") == "value"
    first.close()
    second.close()


async def test_a_call_is_settled_by_whoever_is_asked(place: str) -> None:
    """A worker sees at once what another has admitted and settled, and replays its answer."""
    first, second = Journal.open(place, clock=Clock()), Journal.open(place, clock=Clock())
    call = await admitted(first, claim(1))
    assert second.unredeemed == 0
    await second.settle(call, used=0, outcome=outcome())
    assert await admit(first, claim(1)) == outcome()
    assert first.unredeemed == 1000
    first.close()
    second.close()


async def test_a_worker_that_leaves_settles_its_own(place: str) -> None:
    """A worker that closes the journal leaves nothing open, and what others run alone."""
    first, second = Journal.open(place, clock=Clock()), Journal.open(place, clock=Clock())
    await admitted(first, claim(1))
    await admitted(second, claim(2))
    first.close()
    states = [call and call.state for call in [await second.lookup(SESSION, seq) for seq in (1, 2)]]
    assert states == [CallState.SETTLED, CallState.OPEN]
    second.close()


async def test_pages_of_changes_are_taken_over_once(place: str) -> None:
    """Two workers that read the same page do not take it over twice, or set its cursor back."""
    first, second = Journal.open(place, clock=Clock()), Journal.open(place, clock=Clock())
    page = {"journal": first.journal_id, "since": 0, "serial": 0}
    assert not await first.apply_changes([], until=20, **page)
    assert not await second.apply_changes([], until=10, **page)
    assert first.changes_cursor == second.changes_cursor == 20
    first.close()
    second.close()


def test_a_forked_child_holds_no_locks(place: str) -> None:
    """A child forked from a worker does not keep that worker's number alive, nor close its book."""
    journal = Journal.open(place, clock=Clock())
    reader, writer_end = os.pipe()
    child = os.fork()
    if child == 0:
        journal.close()
        os.close(writer_end)
        os.read(reader, 1)
        os._exit(0)
    try:
        journal.close()
        again = Journal.open(place, clock=Clock())
        assert again._writer._store.worker == 0
        assert again.leads
        again.close()
    finally:
        os.close(writer_end)
        os.waitpid(child, 0)


async def test_a_book_that_goes_back_takes_a_new_id(place: str) -> None:
    """A worker that finds fewer batches than it saw committed admits no old session any more."""
    journals = [Journal.open(place, clock=Clock()) for _ in range(3)]
    await admitted(journals[0], claim(1))
    before = journals[0].journal_id
    for journal in journals:
        journal._writer.totals.serial += 100
    for journal in journals:
        with pytest.raises(Refused) as refused:
            await admit(journal, claim(2, token=replace(TOKEN, journal=before)))
        assert refused.value.reason == "journal_replaced"
    # The first one to find it so gave it a new id; the others took that over.
    assert {journal.replaced for journal in journals} == {frozenset([before])}
    for journal in journals:
        journal.close()

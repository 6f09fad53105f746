"""The journal: calls are admitted, settled and found again, each exactly once."""

import asyncio
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import anyio
import asyncpg
import pytest

from tests.provider.journals import Clock, admit, admitted, claim, outcome
from tests.provider.places import execute
from tests.support.payments import METERED, SESSION, TOKEN
from x402mw.core import gate
from x402mw.core.amounts import Atomic
from x402mw.core.errors import ConfigurationError
from x402mw.core.gate import CallState, Refused
from x402mw.core.sessions import SessionState
from x402mw.provider.journal import (
    Journal,
    JournalCorrupt,
    JournalLocked,
    JournalUnavailable,
    Report,
    rows,
    sqlite,
)
from x402mw.provider.journal.lock import FileLock

pytestmark = pytest.mark.anyio


@pytest.fixture
def clock() -> Clock:
    """A clock at the tests' present."""
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Where the journal is."""
    return str(tmp_path / "journal.db")


@pytest.fixture
def journal(place: str, clock: Clock) -> Iterator[Journal]:
    """An open journal."""
    opened = Journal.open(place, clock=clock)
    yield opened
    opened.close()


async def test_a_call_is_admitted_settled_and_found_again(journal: Journal) -> None:
    """An admitted call is reserved, a settled one charged, and a retry gets its answer."""
    call = await admitted(journal, claim())
    account = await journal.account(SESSION)
    assert account is not None
    assert (account.charged, account.reserved, journal.unredeemed) == (0, 1000, 1000)
    settled = await journal.settle(call, used=0, outcome=outcome())
    assert (settled.charge, settled.charged_total, settled.open_total) == (1000, 1000, 0)
    assert await admit(journal, claim()) == outcome()
    found = await journal.lookup(SESSION, 1)
    assert found is not None
    assert (found.state, found.charge, found.outcome) == (CallState.SETTLED, 1000, outcome())


async def test_a_void_costs_nothing(journal: Journal) -> None:
    """A voided call is charged 0, frees its reservation, and its seq stays used."""
    call = await admitted(journal, claim())
    assert (await journal.settle(call, used=None, outcome=None)).charge == 0
    assert journal.unredeemed == 0
    with pytest.raises(Refused) as refused:
        await admit(journal, claim())
    assert refused.value.reason == "outcome_gone"


async def test_settles_once(journal: Journal) -> None:
    """A second settle changes nothing and returns the first charge."""
    call = await admitted(journal, claim())
    first = await journal.settle(call, used=0, outcome=outcome())
    assert await journal.settle(call, used=None, outcome=outcome(b"other")) == first
    assert await admit(journal, claim()) == outcome()


async def test_one_of_a_thousand_is_admitted(journal: Journal) -> None:
    """The same voucher a thousand times at once is admitted once; every other one is "running"."""
    what = claim()
    answers = await asyncio.gather(
        *(admit(journal, what) for _ in range(1000)), return_exceptions=True
    )
    refusals = [answer for answer in answers if isinstance(answer, Refused)]
    assert len(refusals) == 999
    assert {(refusal.status, refusal.reason) for refusal in refusals} == {(409, "running")}
    assert journal.unredeemed == 1000


async def test_one_form_of_a_seq_is_admitted(journal: Journal) -> None:
    """Of several vouchers with one seq, in any order, one is admitted and the rest are 409."""
    forms = [claim(1, cumulative=amount) for amount in (1000, 2000, 3000)]
    answers = await asyncio.gather(
        *(admit(journal, form) for form in forms), return_exceptions=True
    )
    reasons = [answer.reason for answer in answers if isinstance(answer, Refused)]
    assert reasons == ["seq_used", "seq_used"]


async def test_group_commit(journal: Journal) -> None:
    """Five hundred calls on one session, admitted at once, take few commits."""
    before = journal.serial
    await asyncio.gather(*(admitted(journal, claim(seq)) for seq in range(500)))
    assert journal.serial - before <= 25
    account = await journal.account(SESSION)
    assert account is not None
    assert account.reserved == 500_000 == journal.unredeemed


async def test_refusals_write_nothing(journal: Journal) -> None:
    """What is refused commits nothing, and leaves the totals as they were."""
    before = journal.serial
    with pytest.raises(Refused) as refused:
        await admit(journal, claim(cumulative=999))
    assert refused.value.reason == "cover"
    assert (journal.serial, journal.unredeemed) == (before, 0)
    assert await journal.account(SESSION) is None


async def test_refusal_shows_the_newest_voucher(journal: Journal) -> None:
    """A refusal for lack of cover carries the session's newest voucher, whatever came last."""
    newest = claim(1, cumulative=2000)
    await admitted(journal, newest)
    await admitted(journal, claim(2, cumulative=1000))
    with pytest.raises(Refused) as refused:
        await admit(journal, claim(3, cumulative=1500))
    assert refused.value.best == newest.signed.raw + newest.signed.signature


async def test_metered_calls_add_up_to_the_rounded_total(journal: Journal) -> None:
    """Parallel metered calls cost together base + floor(total quantity x price), in any split."""
    used = [1, 2, 3, 499, 7, 1, 1, 250, 3999, 5000]
    what = [claim(seq, terms=replace(METERED, unit_price=1999)) for seq in range(1, len(used) + 1)]
    calls = [await admitted(journal, one) for one in what]
    settled = await asyncio.gather(
        *(
            journal.settle(call, used=amount, outcome=None)
            for call, amount in zip(calls, used, strict=True)
        )
    )
    billed = sum(one.used for one in settled)
    fits = (METERED.amount - METERED.base) * 1000 // 1999
    assert billed == sum(min(amount, fits) for amount in used)
    assert sum(one.charge for one in settled) == 100 * len(used) + billed * 1999 // 1000


async def test_standing_sees_the_unredeemed_total(journal: Journal) -> None:
    """What bears on admission is judged with the total of that moment, parallel calls included."""

    def away(unredeemed: Atomic) -> gate.Standing:
        return gate.Standing(escrow_away=True, unredeemed=unredeemed, unredeemed_max=Atomic(5000))

    answers = await asyncio.gather(
        *(admit(journal, claim(seq), standing=away) for seq in range(10)), return_exceptions=True
    )
    refusals = [answer for answer in answers if isinstance(answer, Refused)]
    assert [refusal.reason for refusal in refusals] == ["max_unredeemed"] * 5


async def test_cancelled_admission_is_voided(journal: Journal) -> None:
    """A caller that goes away before it hears of its admission leaves nothing reserved."""
    task = asyncio.ensure_future(admit(journal, claim()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # The void follows the admission: both are before whatever is asked once the loop has turned.
    with anyio.fail_after(5):
        while not (call := await journal.lookup(SESSION, 1)) or call.state is CallState.OPEN:
            pass
    assert journal.unredeemed == 0


async def test_close_of_a_session_never_used(journal: Journal) -> None:
    """A close writes the row also of a session first seen by it, and then nothing is admitted."""
    view = await journal.begin_close(claim())
    assert (view.charged, view.reserved, view.open_calls) == (0, 0, 0)
    assert view.state is SessionState.CLOSING
    with pytest.raises(Refused) as refused:
        await admit(journal, claim(2))
    assert (refused.value.reason, refused.value.final) == ("session_closing", True)
    item = await journal.due_session(SESSION, final=True)
    assert item is not None
    assert (item.amount, item.voucher, item.final) == (0, None, True)
    await journal.apply_verdicts([Report(SESSION, Atomic(0), Atomic(0), ended=True)])
    assert (await journal.begin_close(claim())).ended


async def test_open_calls_settle_after_a_close(journal: Journal) -> None:
    """A call that was open when the session began to close is charged as ever."""
    call = await admitted(journal, claim())
    assert (await journal.begin_close(claim(2))).open_calls == 1
    assert (await journal.settle(call, used=0, outcome=None)).charged_total == 1000
    assert (await journal.begin_close(claim(3))).open_calls == 0


def test_an_older_version_shares_with_nobody(path: str) -> None:
    """While a process of the first version has the journal this one is refused, and vice versa."""
    older = FileLock(f"{path}.lock")
    assert older.try_take()
    with pytest.raises(JournalLocked):
        Journal.open(path)
    older.give()
    journal = Journal.open(path)
    assert not older.try_take()
    journal.close()
    assert older.try_take()
    older.close()


def test_a_start_does_not_wait_for_ever(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that was stopped while it opened the journal does not keep others waiting."""
    monkeypatch.setattr(sqlite, "START_SECONDS", 0.05)
    Journal.open(path).close()
    stopped = FileLock(f"{path}-locks/starting")
    assert stopped.try_take()
    with pytest.raises(ConfigurationError, match="another worker"):
        Journal.open(path)
    stopped.close()
    Journal.open(path).close()


async def test_close_gives_the_journal_up(place: str) -> None:
    """After `close` the journal can be opened again; a closed one writes nothing."""
    first = Journal.open(place)
    first.close()
    first.close()
    with pytest.raises(JournalUnavailable):
        await admit(first, claim())
    Journal.open(place).close()


async def test_the_file_is_private_and_keeps_its_identity(path: str) -> None:
    """The file has mode 0600, and its journal id and receipt key outlive a restart."""
    first = Journal.open(path)
    identity = first.journal_id, first.receipt_seed
    await first.set_setting("root", "pinned")
    first.close()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    second = Journal.open(path)
    assert (second.journal_id, second.receipt_seed) == identity
    assert second.setting("root") == "pinned"
    assert second.setting("other") is None
    second.close()


@pytest.mark.parametrize(
    "place", ["postgresql://host/db", "/nowhere/at/all/journal.db", "mysql://x"]
)
def test_unusable_places(place: str) -> None:
    """A place that cannot hold a journal is a configuration error, told at once."""
    with pytest.raises(ConfigurationError):
        Journal.open(place)


def test_a_directory_is_no_journal(tmp_path: Path) -> None:
    """A path that cannot be a file is a configuration error."""
    with pytest.raises(ConfigurationError):
        Journal.open(str(tmp_path))


def test_sqlite_url(tmp_path: Path) -> None:
    """A journal may also be named by a `sqlite:///` URL."""
    Journal.open(f"sqlite:///{tmp_path}/named.db").close()
    assert (tmp_path / "named.db").exists()


def test_another_programs_database_is_left_alone(path: str) -> None:
    """A database that is not a journal is refused and not touched."""
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE notes (text)")
    connection.close()
    with pytest.raises(ConfigurationError):
        Journal.open(path)


def _overwrite(path: str, at: int) -> None:
    """Damages a part of a page."""
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(b"\xa5" * 600)


@pytest.mark.parametrize("at", [0, 4096, 3 * 4096, 8 * 4096])
async def test_damage_is_found_when_opening(path: str, at: int) -> None:
    """A file with a damaged page is refused when opening, before anything is served from it."""
    journal = Journal.open(path, clock=Clock())
    await asyncio.gather(*(admitted(journal, claim(seq)) for seq in range(200)))
    journal.close()
    _overwrite(path, at)
    with pytest.raises(JournalCorrupt):
        Journal.open(path)


async def test_totals_that_are_no_sums_are_found(place: str) -> None:
    """A journal whose totals are not the sums of its rows is refused, whichever total it is."""
    journal = Journal.open(place, clock=Clock())
    await journal.settle(await admitted(journal, claim()), used=0, outcome=None)
    journal.close()
    for table, column in (("totals", "unredeemed"), ("totals", "outcome_bytes"), ("calls", "seq")):
        wrong, right = (f"UPDATE {table} SET {column} = {column} {sign} 1" for sign in "+-")
        if table == "calls":
            wrong, right = (f"UPDATE sessions SET reserved = {amount}" for amount in (7, 0))
        execute(place, wrong)
        with pytest.raises(JournalCorrupt):
            Journal.open(place)
        execute(place, right)
    Journal.open(place).close()


@pytest.mark.parametrize(
    "wrong",
    [{"charged": "4.5"}, {"charged": "5"}, {"charged": "-1"}, {"best": "11"}, {"state": "'odd'"}],
)
def test_the_database_refuses_nonsense(place: str, wrong: dict[str, str]) -> None:
    """The database itself refuses a fraction, and an account that cannot be (M1)."""
    Journal.open(place).close()
    right = dict.fromkeys(rows.SESSIONS.columns, "0")
    numbers = {"deposit": "10", "best": "10", "charged": "4", "reserved": "6", "state": "'open'"}
    nothing = dict.fromkeys(("voucher", "owed_since", "written_off"), "NULL")
    blob = "'\\x01010101010101010101010101010101'" if "://" in place else "zeroblob(16)"
    right |= numbers | nothing | {"id": blob, "journal": blob}

    def insert(values: dict[str, str]) -> None:
        columns = ", ".join(values)
        execute(place, f"INSERT INTO sessions ({columns}) VALUES ({', '.join(values.values())})")

    with pytest.raises((sqlite3.IntegrityError, asyncpg.PostgresError)):
        insert(right | wrong)
    insert(right)


async def test_deposits_grow_with_tokens(journal: Journal) -> None:
    """Of two tokens the larger value of each field holds, whichever comes last."""
    larger = replace(TOKEN, deposit=Atomic(3_000_000), claim_until=TOKEN.claim_until + 100)
    await admitted(journal, claim(1, cumulative=2_500_000, token=larger))
    await admitted(journal, claim(2, cumulative=2_600_000))
    account = await journal.account(SESSION)
    assert account is not None
    assert (account.deposit, account.best) == (3_000_000, 2_600_000)


# Crashes, without the crash: what is open when the file is opened again.


async def test_a_started_call_costs_its_highest_mark(place: str) -> None:
    """After a crash a started call costs its mark and the price of the most it had used."""
    journal = Journal.open(place, clock=Clock())
    call = await admitted(journal, claim(1, terms=METERED))
    await journal.start(call, METERED.base)
    for used in (10, 300, 200):
        await journal.mark(call, used)
    journal.close()
    journal = Journal.open(place, clock=Clock())
    found = await journal.lookup(SESSION, 1)
    assert found is not None
    assert (found.state, found.charge) == (CallState.SETTLED, 100 + 300 * 2)
    assert journal.unredeemed == 700
    journal.close()


async def test_a_crash_never_costs_more_than_the_maximum(place: str) -> None:
    """Use beyond what the maximum pays for is not charged by recovery either."""
    journal = Journal.open(place, clock=Clock())
    call = await admitted(journal, claim(1, terms=METERED))
    await journal.start(call, METERED.base)
    await journal.mark(call, 10**9)
    journal.close()
    journal = Journal.open(place, clock=Clock())
    assert journal.unredeemed == METERED.amount
    journal.close()


LEAVING = """
import asyncio, sys
from tests.provider.journals import Clock, admitted, claim
from x402mw.provider.journal import Journal
async def leave():
    journal = Journal.open(sys.argv[1], clock=Clock())
    await admitted(journal, claim(1))
asyncio.run(leave())
"""


def test_a_process_that_just_ends_closes_its_journal(place: str) -> None:
    """Where nobody closes the journal (a mounted app has no lifespan), the process's end does."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LEAVING, place],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": "client:."},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert execute(place, "SELECT state, charge FROM calls") == [("settled", 0)]


async def test_an_open_call_is_void_after_a_crash(place: str) -> None:
    """After a crash a call that had sent nothing costs nothing; its bytes are answered 410."""
    journal = Journal.open(place, clock=Clock())
    await admitted(journal, claim(1))
    journal.close()
    journal = Journal.open(place, clock=Clock())
    assert journal.unredeemed == 0
    with pytest.raises(Refused) as refused:
        await admit(journal, claim(1))
    assert (refused.value.status, refused.value.reason) == (410, "outcome_gone")
    journal.close()


async def test_marks_after_the_end_change_nothing(journal: Journal) -> None:
    """A settled call can neither start nor be marked; a call never admitted is our own mistake."""
    call = await admitted(journal, claim(1, terms=METERED))
    await journal.settle(call, used=5, outcome=None)
    await journal.start(call, METERED.base)
    await journal.mark(call, 50)
    found = await journal.lookup(SESSION, 1)
    assert found is not None
    assert (found.state, found.charge) == (CallState.SETTLED, 110)
    with pytest.raises(LookupError):
        await journal.mark(replace(call, seq=99), 50)

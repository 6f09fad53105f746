"""What the journal forgets: nothing too early, nothing twice usable, never more than its cap."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.provider.journals import Clock, admit, admitted, claim, outcome, session_id
from tests.provider.places import execute
from tests.support.payments import NOW, SESSION, TOKEN
from x402mw.core.amounts import Atomic
from x402mw.core.gate import CallState, Refused
from x402mw.provider.journal import Journal, Report, rows, transaction
from x402mw.provider.journal.writer import FORGET_SECONDS

pytestmark = pytest.mark.anyio

EXPIRES = NOW + 300
FORGET_AT = EXPIRES + 120 + 600
DAY = 24 * 3600


@pytest.fixture
def clock() -> Clock:
    """A clock at the tests' present."""
    return Clock()


@pytest.fixture
def journal(place: str, clock: Clock) -> Iterator[Journal]:
    """An open journal that keeps at most 2500 bytes of answers."""
    opened = Journal.open(place, clock=clock, outcome_bytes_max=2500)
    yield opened
    opened.close()


async def paid(journal: Journal, seq: int, body: bytes = b"answer") -> None:
    """Admits and settles one call."""
    await journal.settle(await admitted(journal, claim(seq)), used=0, outcome=outcome(body))


async def bodies_kept(journal: Journal, seqs: range) -> list[int]:
    """Which of these calls still have their answer."""
    calls = [(seq, await journal.lookup(SESSION, seq)) for seq in seqs]
    return [seq for seq, call in calls if call is not None and call.outcome is not None]


async def test_oldest_answers_make_room(journal: Journal) -> None:
    """Under the cap all answers are kept; above it the oldest go, and only their bodies."""
    for seq in range(1, 6):
        await paid(journal, seq, bytes(900))
    assert await bodies_kept(journal, range(1, 6)) == [4, 5]
    with pytest.raises(Refused) as refused:
        await admit(journal, claim(1))
    assert refused.value.reason == "outcome_gone"
    assert refused.value.call is not None
    assert refused.value.call.charge == 1000


async def test_an_answer_above_the_cap_is_not_kept(journal: Journal) -> None:
    """One answer larger than the whole cap leaves none, and the call is charged all the same."""
    await paid(journal, 1, bytes(3000))
    assert await bodies_kept(journal, range(1, 2)) == []


async def test_the_answer_of_the_oldest_call_goes_first(journal: Journal) -> None:
    """However late it came: a call that ran long has its answer for as long as there is room."""
    long = await admitted(journal, claim(1))
    for seq in (2, 3):
        await paid(journal, seq, bytes(900))
    await journal.settle(long, used=0, outcome=outcome(bytes(900)))
    assert await bodies_kept(journal, range(1, 4)) == [2, 3]


async def test_few_rows_are_kept_in_mind(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """From batch to batch: of settled calls none, and of what runs no more than the bound."""
    monkeypatch.setattr(transaction, "KNOWN_MAX", 4)
    for seq in (1, 2, 3):
        await admitted(journal, claim(seq))
    await paid(journal, 9)
    assert [seq for _, seq in journal._writer._known.calls] == [1, 2, 3]
    for seq in (4, 5):
        await admitted(journal, claim(seq))
    assert not journal._writer._known.calls
    assert journal._writer._known.sessions


async def test_calls_are_remembered_until_their_time(journal: Journal, clock: Clock) -> None:
    """An answer is there until voucher expiry + 120 s + 600 s; then call and answer go together."""
    await paid(journal, 1)
    clock.now = FORGET_AT - 1
    assert await admit(journal, claim(1)) == outcome()
    clock.now = FORGET_AT + FORGET_SECONDS
    assert await journal.lookup(SESSION, 1) is None


async def test_many_calls_are_pruned_bit_by_bit(journal: Journal, clock: Clock, place: str) -> None:
    """Pruning takes several transactions when much has aged, and leaves nothing behind."""
    for seq in range(20):
        await paid(journal, seq)
    columns = ", ".join(rows.CALLS.columns[3:])
    copy = f"INSERT INTO calls (id, session, seq, {columns})"
    copy += f" SELECT id + %d, session, seq + %d, {columns} FROM calls WHERE seq < 20"
    execute(place, *(copy % (block * 100, block * 100) for block in range(1, 60)))
    clock.now = FORGET_AT
    for _ in range(3):
        await journal.account(SESSION)
    for table in ("calls", "outcomes"):
        assert execute(place, f"SELECT count(*) FROM {table}") == [(0,)]


async def test_a_forgotten_voucher_stays_unusable(journal: Journal, clock: Clock) -> None:
    """A pruned call is not admitted again, not even when the clock has gone back since."""
    await paid(journal, 1)
    clock.now = FORGET_AT + 1
    assert await journal.lookup(SESSION, 1) is None
    clock.now = NOW
    with pytest.raises(Refused) as refused:
        await admit(journal, claim(1))
    assert (refused.value.status, refused.value.reason) == (410, "forgotten")
    await admitted(journal, claim(2, expires=(NOW + 301) * 1000))


async def test_open_calls_are_never_pruned(journal: Journal, clock: Clock) -> None:
    """A call that still runs is remembered however long it takes."""
    call = await admitted(journal, claim(1))
    clock.now = FORGET_AT + DAY
    found = await journal.lookup(SESSION, 1)
    assert found is not None
    assert found.state is CallState.OPEN
    assert (await journal.settle(call, used=0, outcome=None)).charge == 1000


async def test_sessions_go_a_day_after_they_ended(journal: Journal, clock: Clock) -> None:
    """A session is remembered while it lives at the escrow, and a day past its last claim."""
    await paid(journal, 1)
    clock.now = TOKEN.claim_until + 2 * DAY
    assert await journal.account(SESSION) is not None
    report = Report(SESSION, Atomic(1000), Atomic(1000), ended=True)
    await journal.apply_verdicts([report])
    clock.now += DAY
    assert await journal.account(SESSION) is None
    assert journal.unredeemed == 0


async def ended_and_forgotten(journal: Journal, clock: Clock) -> None:
    """Brings SESSION to its end and lets the journal forget it."""
    await paid(journal, 1)
    report = Report(SESSION, Atomic(1000), Atomic(1000), ended=True)
    await journal.apply_verdicts([report])
    clock.now = TOKEN.claim_until + DAY
    assert await journal.account(SESSION) is None


@pytest.mark.parametrize("back", [0, 2 * DAY])
async def test_a_forgotten_session_is_not_begun_anew(
    journal: Journal, clock: Clock, back: int
) -> None:
    """Nothing is admitted, closed or receipted on it, not even if the clock has gone back since."""
    await ended_and_forgotten(journal, clock)
    clock.now -= back
    late = claim(2, expires=int(clock.now + 300) * 1000)
    for what in (admit(journal, late), journal.begin_close(late), journal.check_session(late)):
        with pytest.raises(Refused) as refused:
            await what
        assert (refused.value.status, refused.value.reason) == (410, "forgotten")
    assert await journal.account(SESSION) is None


async def test_a_forgotten_session_proves_no_restored_backup(
    journal: Journal, clock: Clock
) -> None:
    """The escrow knows more of it than this book, and the book stays the same one."""
    await ended_and_forgotten(journal, clock)
    told = Report(SESSION, Atomic(1000), Atomic(1000), ended=True, claim_until=TOKEN.claim_until)
    for report, proof in ((told, False), (replace(told, ended=False), True)):
        since = {"since": 0, "until": 0, "serial": 0}
        name = journal.journal_id
        assert await journal.apply_changes([report], journal=name, **since) is proof


async def test_what_is_owed_is_never_forgotten(journal: Journal, clock: Clock, place: str) -> None:
    """A session whose last call settled after it had ended stays until that is resolved."""
    call = await admitted(journal, claim(1))
    await journal.apply_verdicts([Report(SESSION, Atomic(0), Atomic(0), ended=True)])
    await journal.settle(call, used=0, outcome=None)
    clock.now = TOKEN.claim_until + 2 * DAY
    assert await journal.account(SESSION) is not None
    assert journal.unredeemed == 1000
    journal.close()
    Journal.open(place, clock=clock).close()


async def test_grace_of_terms_survives_a_restart(place: str) -> None:
    """Terms no longer offered are remembered with the time since when, across restarts."""
    clock = Clock()
    old, new, newer = (session_id(number) * 2 for number in (1, 2, 3))
    journal = Journal.open(place, clock=clock)
    assert await journal.keep_terms([old]) == {}
    clock.now += 1000
    assert await journal.keep_terms([new]) == {old: NOW + 1000}
    journal.close()
    clock.now += 100
    journal = Journal.open(place, clock=clock)
    assert await journal.keep_terms([new, newer]) == {old: NOW + 1000}
    assert await journal.keep_terms([old, newer]) == {new: NOW + 1100}
    clock.now += 400
    assert await journal.keep_terms([newer]) == {old: NOW + 1500}
    journal.close()

"""The journal against a model of a few lines, through any sequence of events and restarts."""

import asyncio
import os
import secrets
import tempfile
from collections.abc import Awaitable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.provider.journals import Clock, admit, claim, session_id
from tests.support.payments import METERED, QUOTE, TOKEN
from tests.support.postgresql import shared_server
from x402mw.core.amounts import Atomic
from x402mw.core.gate import Claim, Refused
from x402mw.core.sessions import SessionState
from x402mw.provider.journal import Admitted, Due, Journal, Refusal, Report, postgresql
from x402mw.provider.journal.connections import schema_of
from x402mw.provider.journal.redemption import REST_SECONDS

T = TypeVar("T")
MORE = 20 if os.environ.get("X402MW_LONG") else 1

SESSIONS = st.sampled_from([session_id(number) for number in (1, 2, 3)])
LASTING = replace(TOKEN, exp=2**40, claim_until=2**40)
EVERYTHING = Due(Atomic(1), 0, 0)


@dataclass
class Session:
    """What the model knows of a session."""

    best: int = 0
    charged: int = 0
    sent: int = 0
    redeemed: int = 0
    released: int = 0
    state: SessionState = SessionState.OPEN
    written_off: bool = False
    open: dict[int, Admitted] = field(default_factory=dict)

    @property
    def reserved(self) -> int:
        return sum(call.amount for call in self.open.values())

    @property
    def paid(self) -> int:
        return max(self.redeemed, self.released)

    @property
    def unredeemed(self) -> int:
        return 0 if self.written_off else max(0, self.charged + self.reserved - self.paid)


class JournalAndModel(RuleBasedStateMachine):
    """Does to a journal in a file and to the model the same, and compares."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.TemporaryDirectory()
        self.path = self.new_place()
        self.clock = Clock()
        self.sessions: dict[bytes, Session] = {}
        self.seq = 0
        self.marks: dict[int, int] = {}

    def new_place(self) -> str:
        return str(Path(self.folder.name) / "journal.db")

    def do(self, work: Awaitable[T]) -> T:
        return self.loop.run_until_complete(work)  # type: ignore[arg-type]  # a coroutine

    def claim(self, name: bytes, **changes: Any) -> Claim:
        expires = int(self.clock.now + 300) * 1000
        return claim(self.seq, session=name, token=LASTING, expires=expires, **changes)

    @initialize()
    def opens(self) -> None:
        self.journal = Journal.open(self.path, durability="process", clock=self.clock)

    def teardown(self) -> None:
        self.journal.close()
        self.loop.close()
        self.folder.cleanup()

    @rule(
        name=SESSIONS,
        terms=st.sampled_from([QUOTE, METERED]),
        cumulative=st.sampled_from([1, 1000, 9000, 20_000, 1_000_000, 1_000_001]),
    )
    def admits(self, name: bytes, terms: Any, cumulative: int) -> None:
        session = self.sessions.get(name) or Session()
        best = max(session.best, cumulative)
        covered = session.charged + session.reserved + terms.amount <= best <= 1_000_000
        self.seq += 1
        what = self.claim(name, cumulative=cumulative, terms=terms)
        try:
            call = self.do(admit(self.journal, what))
        except Refused:
            assert not (covered and session.state is SessionState.OPEN)
            return
        assert isinstance(call, Admitted)
        assert covered
        assert session.state is SessionState.OPEN
        session.best = best
        session.open[self.seq] = call
        self.sessions[name] = session

    @precondition(lambda self: any(session.open for session in self.sessions.values()))
    @rule(data=st.data(), used=st.sampled_from([None, 0, 1, 499, 5000]))
    def settles(self, data: Any, used: int | None) -> None:
        session, call = self._pick(data)
        settled = self.do(self.journal.settle(call, used=used, outcome=None))
        del session.open[call.seq]
        self.marks.pop(call.seq, None)
        session.charged += settled.charge
        assert settled.charged_total == session.charged
        assert settled.open_total == session.reserved
        if not call.terms.metered:
            assert settled.charge == (0 if used is None else call.amount)
        again = self.do(self.journal.settle(call, used=5000, outcome=None))
        assert again == settled

    @precondition(lambda self: any(session.open for session in self.sessions.values()))
    @rule(data=st.data())
    def starts(self, data: Any) -> None:
        _, call = self._pick(data)
        self.do(self.journal.start(call, Atomic(100)))
        self.marks[call.seq] = 100

    def _pick(self, data: Any) -> tuple[Session, Admitted]:
        busy = [session for session in self.sessions.values() if session.open]
        session = data.draw(st.sampled_from(busy))
        return session, session.open[data.draw(st.sampled_from(sorted(session.open)))]

    @rule(name=SESSIONS)
    def closes(self, name: bytes) -> None:
        view = self.do(self.journal.begin_close(self.claim(name)))
        session = self.sessions.setdefault(name, Session())
        if session.state is SessionState.OPEN:
            session.state = SessionState.CLOSING
        assert (view.charged, view.reserved) == (session.charged, session.reserved)
        assert view.open_calls == len(session.open)

    @precondition(lambda self: self.sessions)
    @rule(part=st.sampled_from([0, 1, 2]), code=st.sampled_from(["", "signature", "odd"]))
    def redeems(self, part: int, code: str) -> None:
        """The escrow takes over 0, a half or all of what was sent, or refuses."""
        self.clock.now += REST_SECONDS
        items = self.do(self.journal.due(EVERYTHING, 10))
        owing = {name for name, session in self.sessions.items() if self._is_due(session)}
        assert {item.session for item in items} == owing
        for item in items:
            session = self.sessions[item.session]
            session.sent = max(session.sent, session.charged)
            assert item.amount == session.charged
            assert item.final == (session.state is SessionState.CLOSING and not session.open)
        if code:
            refusals = [Refusal(item.session, code) for item in items]
            assert not self.do(self.journal.apply_verdicts([], refusals))
            if code == "signature":
                for item in items:
                    self.sessions[item.session].written_off = True
                    self.sessions[item.session].state = SessionState.CLOSED
            return
        reports = [self._accept(item.session, part, final=item.final) for item in items]
        assert not self.do(self.journal.apply_verdicts(reports))

    def _is_due(self, session: Session) -> bool:
        if session.written_off:
            return False
        closes = session.state is SessionState.CLOSING and not session.open
        return closes or session.charged > session.paid

    def _accept(self, name: bytes, part: int, *, final: bool) -> Report:
        session = self.sessions[name]
        amount = session.sent if final else session.sent * part // 2
        session.redeemed = max(session.redeemed, amount)
        session.released = max(session.released, amount)
        if final:
            session.state = SessionState.CLOSED
        redeemed, released = Atomic(session.redeemed), Atomic(session.released)
        return Report(name, redeemed, released, ended=final)

    @rule(name=SESSIONS, amount=st.sampled_from([1, 500, 5000]))
    def buyer_releases(self, name: bytes, amount: int) -> None:
        """A change at the escrow: the buyer has paid by hand."""
        session = self.sessions.get(name)
        released = amount if session is None else max(session.released, amount)
        redeemed = session.redeemed if session else 0
        report = Report(name, Atomic(redeemed), Atomic(released), ended=False)
        turned = self.journal.changes_cursor
        page = {"since": turned, "until": turned + 1, "serial": 0}
        apply = self.journal.apply_changes([report], journal=self.journal.journal_id, **page)
        assert not self.do(apply)
        if session is not None:
            session.released = released
            if session.charged <= session.paid:
                session.written_off = False

    @rule()
    def restarts(self) -> None:
        self.journal.close()
        self.opens()
        for session in self.sessions.values():
            for seq in session.open:
                session.charged += self.marks.pop(seq, 0)
            session.open.clear()

    @invariant()
    def agree(self) -> None:
        total = sum(session.unredeemed for session in self.sessions.values())
        for name, session in self.sessions.items():
            account = self.do(self.journal.account(name))
            assert account is not None
            found = (account.best, account.charged, account.reserved, account.state)
            assert found == (session.best, session.charged, session.reserved, session.state)
        if self.sessions:
            assert self.journal.unredeemed == total


class ServerJournalAndModel(JournalAndModel):
    """Does it to a journal in PostgreSQL."""

    def __init__(self) -> None:
        super().__init__()
        self.grace = mock.patch.object(postgresql, "FREE_ROUNDS", 1)
        self.grace.start()

    def new_place(self) -> str:
        return f"{shared_server().url()}&search_path=model_{secrets.token_hex(8)}"

    def teardown(self) -> None:
        super().teardown()
        self.grace.stop()
        shared_server().execute(f"DROP SCHEMA {schema_of(self.path)} CASCADE")


JournalAndModel.TestCase.settings = settings(max_examples=30 * MORE, stateful_step_count=30)
TestJournalAndModel = JournalAndModel.TestCase
ServerJournalAndModel.TestCase.settings = settings(max_examples=4 * MORE, stateful_step_count=30)
TestServerJournalAndModel = ServerJournalAndModel.TestCase

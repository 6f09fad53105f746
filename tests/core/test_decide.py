"""The gate, steps 9 to 12: one decision over the journal's rows."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.support import payments as world
from tests.support.payments import BOOK, METERED, NOW, OFFERS, QUOTE, TOKEN, Payment
from x402mw.core import gate, sessions
from x402mw.core.amounts import Atomic
from x402mw.core.gate import Call, CallState, Outcome, Refused, Standing
from x402mw.core.sessions import Account, SessionState
from x402mw.core.terms import Terms

CLAIM = world.inspect(Payment())
OUTCOME = Outcome(200, ((b"content-type", b"text/plain"),), b"BTC 1", b"who")
SETTLED = Call(
    CLAIM.session, CLAIM.seq, CLAIM.commitment, Atomic(1000), CallState.SETTLED, outcome=OUTCOME
)


def decide(claim: gate.Claim = CLAIM, **changes: Any) -> Account | Outcome:
    """Decides on a claim against an empty journal, or the rows in `changes`."""
    usual: dict[str, Any] = {
        "offer": OFFERS[QUOTE.id],
        "book": BOOK,
        "standing": Standing(),
        "call": None,
        "account": None,
        "best": None,
        "credentials": b"who",
        "now": NOW,
    }
    return gate.decide(claim, **usual | changes)


def refusal(claim: gate.Claim = CLAIM, **changes: Any) -> Refused:
    """The refusal of such a claim."""
    with pytest.raises(Refused) as caught:
        decide(claim, **changes)
    assert caught.value.seq == claim.seq
    assert caught.value.commitment == claim.commitment
    return caught.value


def test_a_first_call_is_admitted() -> None:
    """A session seen for the first time starts at nothing, with its token's deposit."""
    account = decide()
    assert account == Account(TOKEN.deposit, Atomic(1000), Atomic(0), Atomic(1000))


LATE: dict[str, dict[str, Any]] = {
    "voucher expired": {"now": NOW + 300 + 121},
    "token expired": {"now": NOW + 601},
    "long ago": {"now": NOW + 10**6},
    "terms changed": {"offer": OFFERS[METERED.id], "book": replace(BOOK, offers={})},
    "session closing": {"account": Account(state=SessionState.CLOSING)},
    "session closed": {"account": Account(state=SessionState.CLOSED)},
    "escrow away": {"standing": Standing(escrow_away=True)},
    "clock off": {"standing": Standing(clock_off=True)},
}


@pytest.mark.parametrize("name", LATE)
def test_a_late_identical_retry_gets_its_outcome(name: str) -> None:
    """Whatever has changed since, the same bytes get the stored outcome and never 402."""
    assert decide(call=SETTLED, **LATE[name]) is OUTCOME


@pytest.mark.parametrize("name", LATE)
@pytest.mark.parametrize(
    ("call", "status", "reason"),
    [
        (replace(SETTLED, commitment=bytes(32)), 409, "seq_used"),
        (replace(SETTLED, commitment=bytes(32), state=CallState.OPEN), 409, "seq_used"),
        (replace(SETTLED, state=CallState.OPEN, outcome=None), 409, "running"),
        (replace(SETTLED, state=CallState.STARTED, outcome=None), 409, "running"),
        (replace(SETTLED, outcome=None), 410, "outcome_gone"),
        (replace(SETTLED, outcome=replace(OUTCOME, credentials=b"x")), 409, "credentials"),
    ],
)
def test_a_used_seq_is_never_402(name: str, call: Call, status: int, reason: str) -> None:
    """A seq that has a row is answered from the row alone, with 409 or 410."""
    found = refusal(call=call, **LATE[name])
    assert (found.status, found.reason, found.call) == (status, reason, call)
    assert bool(found.retry_after) == (reason == "running")


OLD = replace(QUOTE, amount=Atomic(900))
ABSENT = Standing(escrow_away=True, unredeemed_max=Atomic(1000))
ABSENT_FULL = replace(ABSENT, unredeemed=Atomic(1))


@pytest.mark.parametrize(
    ("changes", "status", "reason", "final"),
    [
        ({"account": Account(state=SessionState.CLOSING)}, 402, "session_closing", True),
        ({"account": Account(state=SessionState.CLOSED)}, 402, "session_closing", True),
        ({"standing": Standing(clock_off=True)}, 503, "clock", False),
        ({"standing": Standing(throttled=True)}, 429, "quota", False),
        ({"now": NOW + 600}, 402, "token_expired", False),
        ({"now": NOW + 600, "standing": Standing(escrow_away=True)}, 503, "escrow_away", False),
        ({"now": NOW + 420}, 402, "voucher_expires", True),
        ({"now": NOW - 120}, 402, "voucher_expires", False),
        ({"offer": OFFERS[METERED.id]}, 402, "terms", False),
        ({"standing": ABSENT_FULL}, 503, "max_unredeemed",
         False),
        ({"account": Account(Atomic(10**6), Atomic(1000), Atomic(0), Atomic(1))}, 402, "cover",
         False),
        ({"account": Account(Atomic(10**6), Atomic(2000), Atomic(1001), Atomic(0))}, 402, "cover",
         False),
    ],
)  # fmt: skip
def test_every_reason_to_refuse(
    changes: dict[str, Any], status: int, reason: str, final: bool
) -> None:
    """Each cause has its status and code; `final` only where these bytes can never pass."""
    found = refusal(**changes)
    assert (found.status, found.reason, found.final) == (status, reason, final)
    assert bool(found.retry_after) == (status in (429, 503))
    assert ("serverTime" in found.more) == (reason == "voucher_expires")


@pytest.mark.parametrize(
    ("now", "standing"),
    [(NOW + 419, Standing()), (NOW - 119, Standing()),
     (NOW, ABSENT)],
)  # fmt: skip
def test_the_edges_that_still_pass(now: int, standing: Standing) -> None:
    """A voucher passes 120 s late and 420 s early; an absent escrow allows its bound."""
    assert isinstance(decide(now=now, standing=standing), Account)


def test_a_deposit_bounds_every_voucher() -> None:
    """A voucher above the deposit is not covered, however little the call costs."""
    found = refusal(world.inspect(Payment(cumulative=TOKEN.deposit + 1)), best=b"newest")
    assert (found.reason, found.best) == ("cover", b"newest")


def test_a_newer_token_raises_the_deposit() -> None:
    """After a top-up the larger deposit counts, and it never falls back."""
    topped = replace(TOKEN, deposit=Atomic(2_000_000))
    account = decide(world.inspect(Payment(token=topped, cumulative=2_000_000)))
    assert isinstance(account, Account)
    again = decide(world.inspect(Payment(seq=8, cumulative=2_000_000)), account=account)
    assert isinstance(again, Account)
    assert again.deposit == 2_000_000


def test_a_retired_signing_key_admits_nothing_new() -> None:
    """A token by a retired key checks, so retries work, but buys nothing any more."""
    claim = replace(CLAIM, token=replace(CLAIM.token, retired=True))
    assert refusal(claim).reason == "token_retired"
    assert decide(claim, call=SETTLED) is OUTCOME


@pytest.mark.parametrize(("age", "passes"), [(0, True), (299, True), (300, False)])
def test_former_terms_pass_for_a_while(age: int, passes: bool) -> None:
    """What was signed before a price change is charged as signed, for 300 s."""
    claim = world.inspect(Payment(terms=OLD))
    book = replace(BOOK, retired={OLD.id: NOW - age})
    if passes:
        assert isinstance(decide(claim, book=book), Account)
    else:
        assert refusal(claim, book=book).reason == "terms"


def test_former_terms_in_another_unit_are_refused() -> None:
    """A handler that counts words cannot serve terms in tokens."""
    claim = world.inspect(Payment(terms=METERED))
    words = replace(METERED, unit="word")
    book = replace(BOOK, retired={METERED.id: NOW})
    assert refusal(claim, offer=world.offer_of(words), book=book).reason == "terms"


def test_terms_never_offered_are_refused() -> None:
    """A price that the buyer made up is none."""
    assert refusal(world.inspect(Payment(terms=OLD))).reason == "terms"


@given(st.permutations(range(4)), st.data())
def test_all_forms_of_one_request_are_admitted_once(order: list[int], data: st.DataObject) -> None:
    """Every signed form of one request, in any order and twice: one admission."""
    forms = [
        Payment(cumulative=1000),
        Payment(cumulative=5000),
        Payment(cumulative=5000, expires=(NOW + 310) * 1000),
        Payment(cumulative=5000, terms=OLD),
    ]
    book = replace(BOOK, retired={OLD.id: NOW})
    rows: dict[tuple[bytes, int], Call] = {}
    account, admitted = None, 0
    for index in [*order, *data.draw(st.permutations(order))]:
        claim = world.inspect(forms[index])
        try:
            found = decide(
                claim, book=book, account=account, call=rows.get((claim.session, claim.seq))
            )
        except Refused as refused:
            assert refused.status == 409
            continue
        assert isinstance(found, Account)
        account, admitted = found, admitted + 1
        rows[claim.session, claim.seq] = Call(
            claim.session, claim.seq, claim.commitment, claim.terms.amount
        )
    assert admitted == 1


@pytest.mark.parametrize("terms", [QUOTE, METERED])
def test_a_moved_voucher_is_refused_when_its_seq_is_settled(terms: Terms) -> None:
    """A settled seq answers its own request only: the request is compared before the row."""
    claim = world.inspect(Payment(terms=terms, method="GET"))
    for change in ({"target": "/quote/ETH"}, {"method": "POST"}, {"body": b"x"}):
        moved = replace(Payment(terms=terms, method="GET"), **change)
        with pytest.raises(Refused, match="another request"):
            world.bind(claim, moved)


@dataclass
class Shelf:
    """A journal in memory: what one write transaction sees."""

    calls: dict[int, Call] = field(default_factory=dict)
    account: Account | None = None


class Gate(RuleBasedStateMachine):
    """Payments of one session arrive, settle and close in any order while time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.shelf = Shelf()
        self.admissions: dict[int, bytes] = {}
        self.now = NOW

    @rule(seq=st.integers(0, 5), cumulative=st.integers(0, 8000), late=st.booleans())
    def pay(self, seq: int, cumulative: int, late: bool) -> None:
        """A voucher for one of six requests: admitted once per seq, refused with a code else."""
        expires = (NOW + (400 if late else 300)) * 1000
        claim = CLAIMS.setdefault(
            (seq, cumulative // 500, late),
            world.inspect(Payment(seq=seq, cumulative=cumulative // 500 * 500, expires=expires)),
        )
        try:
            found = decide(
                claim, call=self.shelf.calls.get(seq), account=self.shelf.account, now=self.now
            )
        except Refused as refused:
            assert (refused.status == 402) <= (seq not in self.admissions)
            return
        if isinstance(found, Outcome):
            assert self.admissions[seq] == claim.commitment
            return
        assert seq not in self.admissions
        self.admissions[seq] = claim.commitment
        self.shelf.account = found
        self.shelf.calls[seq] = Call(claim.session, seq, claim.commitment, claim.terms.amount)

    @rule(charge=st.integers(0, 1000), kept=st.booleans())
    def finish(self, charge: int, kept: bool) -> None:
        """The oldest running call settles."""
        running = [call for call in self.shelf.calls.values() if call.state is CallState.OPEN]
        if running and self.shelf.account:
            call = running[0]
            self.shelf.account = sessions.settle(
                self.shelf.account, reserved=call.amount, charge=Atomic(charge)
            )
            self.shelf.calls[call.seq] = replace(
                call,
                state=CallState.SETTLED,
                charge=Atomic(charge),
                outcome=OUTCOME if kept else None,
            )

    @rule()
    def close(self) -> None:
        """The session closes."""
        account = self.shelf.account or Account()
        self.shelf.account = sessions.move(account, sessions.SessionEvent.CLOSE)

    @rule(seconds=st.integers(0, 200))
    def wait(self, seconds: int) -> None:
        """Time passes."""
        self.now += seconds

    @invariant()
    def sound(self) -> None:
        """One row per admission, and the account covers exactly the open rows."""
        assert set(self.shelf.calls) == set(self.admissions)
        account = self.shelf.account or Account()
        held = [call.amount for call in self.shelf.calls.values() if call.state is CallState.OPEN]
        assert account.reserved == sum(held)
        assert account.charged + account.reserved <= account.best <= account.deposit


CLAIMS: dict[tuple[int, int, bool], gate.Claim] = {}
TestGate = Gate.TestCase

"""The sum of what all sessions may come to, kept up to date instead of added up."""

import dataclasses
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.client.scripted import route
from x402mw.core.amounts import Atomic
from x402mw_client.sessions import Offer, Session, State
from x402mw_client.totals import WorstSum

OFFER = Offer(route("GET", "/item/{name}", 1000), {})
SESSION = Session(b"", "https://a.example", OFFER, bytes(32), "", Atomic(9), Atomic(9), 0)
STEPS = st.tuples(
    st.integers(0, 2000),
    st.integers(0, 3),
    st.sampled_from(["none", "gone", "late", *State]),
    st.integers(0, 2000),
    st.tuples(*[st.integers(0, 9).map(Atomic)] * 3),
)


@given(st.lists(STEPS, max_size=20))
def test_it_is_the_sum_of_all(steps: list[Any]) -> None:
    """Whatever comes, goes, changes late or runs out, and wherever the clock is set."""
    found = WorstSum()
    sessions: dict[bytes, Session] = {}
    for now, which, what, expires_at, (charged, held, cumulative) in steps:
        name = bytes([which])
        if what == "gone" and name in sessions:
            found.gone(sessions.pop(name))
        elif what == "late" and name not in sessions:
            found.changed(dataclasses.replace(SESSION, id=name, charged=charged))
        elif isinstance(what, State):
            session = sessions.setdefault(name, dataclasses.replace(SESSION, id=name))
            session.state, session.expires_at = what, expires_at
            session.charged, session.held, session.cumulative = charged, held, cumulative
            found.changed(session)
        worst = sum(session.at_worst(now) for session in sessions.values())
        assert found.at(now, sessions) == worst

"""The interface through which figures leave: nothing that fails there reaches who uses it."""

from tests.support.figures import Broken, Figures
from x402mw.core.telemetry import HANDLER_SECONDS, OPEN_CALLS, REQUESTS, Measure, shield

TOLD: list[Exception] = []


def test_a_shield_passes_everything_on():
    """What works is passed on as it is, and ended as it was begun."""
    figures, told = Figures(), []
    shielded = shield(figures, told.append)
    assert shielded is not None
    shielded.add(REQUESTS, 2, outcome="paid")
    shielded.record(HANDLER_SECONDS, 0.5, route="GET /")
    unwatch = shielded.watch(OPEN_CALLS, lambda: 3)
    assert figures.sums == {("provider.requests", "paid"): 2}
    assert figures.durations == {("provider.handler.duration", "GET /"): [0.5]}
    assert figures.read() == {"provider.open_calls": 3}
    unwatch()
    assert figures.read() == {}
    assert told == []


def test_a_failing_telemetry_hurts_nobody_and_is_told_once():
    """Figures may be lost; calls, charges and logs of a full disk may not."""
    told: list[Exception] = []
    shielded = shield(Broken(), told.append)
    assert shielded is not None
    shielded.add(REQUESTS, 1)
    shielded.record(HANDLER_SECONDS, 0.1)
    shielded.watch(OPEN_CALLS, lambda: 0)()
    assert [str(error) for error in told] == ["no figures today"]


def test_nobody_listening_stays_nobody():
    """None costs one comparison, and no object stands in its place."""
    assert shield(None, TOLD.append) is None


def test_measures_are_named_once_and_said_in_a_sentence():
    """Two measures of one name would be added up to nonsense."""
    import x402mw.core.telemetry as module

    measures = [value for value in vars(module).values() if isinstance(value, Measure)]
    names = [measure.name for measure in measures]
    assert len(names) == len(set(names)) >= 17
    for measure in measures:
        assert measure.name.startswith("x402mw.")
        assert measure.description[0].isupper()
        assert measure.unit == "s" or measure.unit.strip("{}")

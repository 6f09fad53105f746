"""A `Telemetry` for tests, that adds up what it is given."""

from collections import Counter, defaultdict
from collections.abc import Callable

from x402mw.core.telemetry import Measure

Key = tuple[str, ...]


class Figures:
    """Sums by (name without its prefix, label values in the order given), and gauges by name."""

    def __init__(self) -> None:
        self.sums: Counter[Key] = Counter()
        self.durations: defaultdict[Key, list[float]] = defaultdict(list)
        self.gauges: dict[str, Callable[[], float]] = {}

    def add(self, measure: Measure, amount: int, /, **labels: str) -> None:
        """Adds up."""
        assert type(amount) is int
        self.sums[(_short(measure), *labels.values())] += amount

    def record(self, measure: Measure, seconds: float, /, **labels: str) -> None:
        """Keeps every duration."""
        assert 0 <= seconds < 600
        self.durations[(_short(measure), *labels.values())].append(seconds)

    def watch(self, measure: Measure, read: Callable[[], float], /) -> Callable[[], None]:
        """Keeps the gauge until it is ended."""
        name = _short(measure)
        self.gauges[name] = read
        return lambda: self.gauges.pop(name) and None

    def read(self) -> dict[str, float]:
        """Reads every gauge."""
        return {name: read() for name, read in self.gauges.items()}


def _short(measure: Measure) -> str:
    return measure.name.removeprefix("x402mw.")


class Broken:
    """A `Telemetry` that fails at everything."""

    def add(self, *_: object, **labels: str) -> None:
        """Fails."""
        raise RuntimeError("no figures today")

    record = watch = add  # type: ignore[assignment] # it fails whatever is asked

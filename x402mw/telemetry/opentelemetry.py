"""Figures as OpenTelemetry metrics; needs the extra `opentelemetry`, which is its API alone.

from x402mw.telemetry.opentelemetry import OpenTelemetry
Provider(..., telemetry=OpenTelemetry())
"""

import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation, get_meter_provider

from x402mw.core.telemetry import Measure

SCOPE = "x402mw"
SECONDS_BOUNDARIES = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
"""Advice for histograms; a view of the SDK may choose others."""

Instrument = TypeVar("Instrument")


class OpenTelemetry:
    """Feeds a `MeterProvider`, the global one if none is given; one instrument for each measure."""

    def __init__(self, meter_provider: MeterProvider | None = None) -> None:
        self._meter = (meter_provider or get_meter_provider()).get_meter(SCOPE)
        self._instruments: dict[Measure, Any] = {}
        self._readers: dict[Measure, list[Callable[[], float]]] = {}
        self._lock = threading.Lock()

    def add(self, measure: Measure, amount: int, /, **labels: str) -> None:
        """Adds to a counter."""
        counter = self._instruments.get(measure) or self._make(measure, self._counter)
        counter.add(amount, labels)

    def record(self, measure: Measure, seconds: float, /, **labels: str) -> None:
        """Records a duration in a histogram."""
        histogram = self._instruments.get(measure) or self._make(measure, self._histogram)
        histogram.record(seconds, labels)

    def watch(self, measure: Measure, read: Callable[[], float], /) -> Callable[[], None]:
        """Observes a gauge whenever the SDK collects, until the returned function is called."""
        with self._lock:
            readers = self._readers.setdefault(measure, [])
            readers.append(read)
        if measure not in self._instruments:
            self._make(measure, self._gauge)
        return lambda: self._unwatch(readers, read)

    def _unwatch(self, readers: list[Callable[[], float]], read: Callable[[], float]) -> None:
        with self._lock:
            if read in readers:
                readers.remove(read)

    def _make(self, measure: Measure, build: Callable[[Measure], Any]) -> Any:
        with self._lock:
            found = self._instruments.get(measure)
            if found is None:
                found = self._instruments[measure] = build(measure)
            return found

    def _counter(self, measure: Measure) -> Any:
        return self._meter.create_counter(measure.name, measure.unit, measure.description)

    def _histogram(self, measure: Measure) -> Any:
        return self._meter.create_histogram(
            measure.name,
            measure.unit,
            measure.description,
            explicit_bucket_boundaries_advisory=SECONDS_BOUNDARIES,
        )

    def _gauge(self, measure: Measure) -> Any:
        readers = self._readers[measure]

        def observe(_options: CallbackOptions) -> Iterable[Observation]:
            with self._lock:
                found = list(readers)
            return [Observation(read()) for read in found]

        return self._meter.create_observable_gauge(
            measure.name, [observe], measure.unit, measure.description
        )

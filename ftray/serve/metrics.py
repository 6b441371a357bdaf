"""Prometheus metrics. Labels are model ids that are served and HTTP statuses: their number is bounded."""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

from ftray.engine.api import EngineStats

UNKNOWN = "unknown"
"""Model label of requests that name no served model."""

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """What one HTTP front has seen."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "ftray_requests", "Requests answered.", ["model", "status"], registry=registry
        )
        self.tokens = Counter("ftray_tokens", "Tokens by kind.", ["model", "kind"], registry=registry)
        self.first_token = Histogram(
            "ftray_time_to_first_token_seconds",
            "Seconds from a request's arrival to its first token.",
            ["model"],
            registry=registry,
            buckets=_SECONDS,
        )
        self.in_flight = Gauge("ftray_requests_in_flight", "Requests being answered.", registry=registry)
        self._engine = {
            name: Gauge(f"ftray_engine_{name}", help_, registry=registry)
            for name, help_ in (
                ("running", "Requests that hold a row."),
                ("waiting", "Requests that wait for a row."),
                ("blocks_used", "KV blocks that belong to a request."),
                ("blocks_total", "KV blocks."),
            )
        }

    def observe_engine(self, stats: EngineStats) -> None:
        """Take over an engine's load; with several replicas, that of the one which was asked."""
        for name, gauge in self._engine.items():
            gauge.set(getattr(stats, name))

    def render(self, visible: Iterable[str] | None) -> bytes:
        """The text format; with `visible`, the series of these models alone."""
        if visible is None:
            return generate_latest(self._registry)
        return generate_latest(_Visible(self._registry, frozenset(visible)))


class _Visible:
    """A registry as one tenant may see it."""

    def __init__(self, registry: CollectorRegistry, models: frozenset[str]) -> None:
        self._registry = registry
        self._models = models

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [
                sample for sample in metric.samples if sample.labels.get("model") in self._models
            ]
            if metric.samples:
                yield metric

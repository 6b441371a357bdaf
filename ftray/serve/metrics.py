"""Prometheus metrics of one HTTP front, with a bounded number of series."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

from ftray.engine.api import EngineStats

UNKNOWN = "unknown"
"""Model label of requests that name no served model."""
OTHER = "other"
"""Model label of models beyond a bound."""
OTHERS = "(others)"
"""Tenant label of tenants beyond the bound; no tenant can be called so."""
MAX_PAIRS = 2000
"""Most pairs of tenant and model that have series of their own."""
MAX_MODELS = 200
"""Most models that have a histogram of their own."""

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """What one HTTP front has seen. Labels are tenants, model ids that are served and HTTP statuses.

    Args:
        is_tenant: whether a name is still a tenant's; the series of others go when there is no room for new ones.
    """

    def __init__(self, is_tenant: Callable[[str], bool] = lambda name: True) -> None:
        self._is_tenant = is_tenant
        self._registry = registry = CollectorRegistry()
        self._pairs: set[tuple[str, str]] = set()
        self._requests = Counter(
            "ftray_requests", "Requests answered.", ["tenant", "model", "status"], registry=registry
        )
        self._tokens = Counter(
            "ftray_tokens", "Tokens by kind.", ["tenant", "model", "kind"], registry=registry
        )
        self._tenants: set[str] = set()
        self._models: set[str] = set()
        self._first_token = Histogram(
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
                ("running", "Answers that hold a row."),
                ("waiting", "Answers that wait for a row."),
                ("blocks_used", "KV blocks that belong to an answer."),
                ("blocks_total", "KV blocks."),
                ("slots_used", "Deltas in place."),
                ("slots_total", "Deltas that fit in place."),
            )
        }

    def count(self, tenant: str, model: str, status: int, prompt_tokens: int, completion_tokens: int) -> None:
        """Count one request that has ended."""
        tenant, model = self._bounded(tenant, model)
        self._requests.labels(tenant, model, status).inc()
        for kind, amount in (("prompt", prompt_tokens), ("completion", completion_tokens)):
            if amount:
                self._tokens.labels(tenant, model, kind).inc(amount)

    def first_token(self, model: str, seconds: float) -> None:
        """Take over when an answer's first token came, since the request's arrival."""
        if model not in self._models and len(self._models) >= MAX_MODELS:
            model = OTHER
        else:
            self._models.add(model)
        self._first_token.labels(model).observe(seconds)

    def observe_engine(self, stats: EngineStats) -> None:
        """Take over an engine's load; with several replicas, that of the one which was asked."""
        for name, gauge in self._engine.items():
            gauge.set(getattr(stats, name))

    def render(self, tenant: str | None) -> bytes:
        """The text format; of one tenant the series with its name alone."""
        if tenant is None:
            return generate_latest(self._registry)
        return generate_latest(_Visible(self._registry, tenant))

    def _bounded(self, tenant: str, model: str) -> tuple[str, str]:
        """A pair as labels: beyond the bound the tenants there are share one model, and all others one tenant."""
        if (tenant, model) not in self._pairs and len(self._pairs) >= MAX_PAIRS:
            self._forget_those_who_left()
        if (tenant, model) not in self._pairs and len(self._pairs) >= MAX_PAIRS:
            return (tenant if tenant in self._tenants else OTHERS), OTHER
        self._pairs.add((tenant, model))
        self._tenants.add(tenant)
        return tenant, model

    def _forget_those_who_left(self) -> None:
        gone = {name for name in self._tenants if name and not self._is_tenant(name)}
        for tenant in gone:
            for counter in (self._requests, self._tokens):
                counter.remove_by_labels({"tenant": tenant})
        self._tenants -= gone
        self._pairs = {(tenant, model) for tenant, model in self._pairs if tenant not in gone}


class _Visible:
    """A registry as one tenant may see it: without what others do."""

    def __init__(self, registry: CollectorRegistry, tenant: str) -> None:
        self._registry = registry
        self._tenant = tenant

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [
                sample for sample in metric.samples if sample.labels.get("tenant") == self._tenant
            ]
            if metric.samples:
                yield metric

"""What an HTTP front knows of the endpoint, replaced as a whole when the endpoint changes."""

import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ftray.config.tenant import TenantConfig
from ftray.core.errors import RequestError
from ftray.serve.backend import ServedModel
from ftray.serve.tenants import Access


@dataclass(frozen=True, kw_only=True)
class View:
    """What the fronts are to offer."""

    models: Sequence[ServedModel]
    """What is served, each with the digest that answers now."""
    pending: frozenset[str] = frozenset()
    """Ids that have nothing to answer yet; a front keeps what it had for them."""
    tenants: Sequence[TenantConfig] = ()
    """Who may ask."""
    draining: bool = False
    """No request is taken any more."""


@dataclass
class Front:
    """One HTTP front's picture of the endpoint.

    Args:
        view: to start with.
        keys: whether every request needs a key.
        metrics_key_sha256: of the operator's key.
    """

    view: View
    keys: bool | None = None
    metrics_key_sha256: str | None = None
    name: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    in_flight: Counter[ServedModel] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.access = self._access(self.view)

    def update(self, view: View) -> None:
        """Offer something else from the next request on; requests in flight end as they began."""
        known = {model.id for model in view.models}
        kept = [model for model in self.view.models if model.id in view.pending - known]
        view = View(
            models=[*view.models, *kept], pending=view.pending, tenants=view.tenants, draining=view.draining
        )
        if view == self.view:
            return
        self.access = self._access(view)
        self.view = view

    def check_open(self) -> None:
        """Refuse what comes while the endpoint drains. Raises `RequestError` (503)."""
        if self.view.draining:
            message = "the endpoint is being stopped; try again shortly"
            raise RequestError(message, status=503, code="unavailable", retry_after_s=5)

    def in_use(self) -> list[ServedModel]:
        """What requests may still be sent to the engines for."""
        return list({model.digest: model for model in [*self.view.models, *+self.in_flight]}.values())

    def _access(self, view: View) -> Access:
        return Access(view.tenants, view.models, self.metrics_key_sha256, keys=self.keys)

"""Who asks, and which models they may use."""

import hashlib
import hmac
from collections.abc import Sequence

from ftray.config.serve import TenantConfig
from ftray.core.errors import ConfigError, RequestError
from ftray.serve.backend import ServedModel

BASE = "base"
"""What a request calls the base model."""


class Access:
    """Keys to tenants, tenants to models. Without tenants everybody sees everything.

    Args:
        tenants: who may ask.
        models: what is served.
        metrics_key_sha256: of the operator's key, good for the metrics alone.

    Raises:
        ConfigError: if two of them cannot be told apart, or a tenant's delta is not served.
    """

    def __init__(
        self,
        tenants: Sequence[TenantConfig],
        models: Sequence[ServedModel],
        metrics_key_sha256: str | None = None,
    ) -> None:
        self._keys: list[tuple[bytes, str | None]] = [
            (bytes.fromhex(tenant.key_sha256), tenant.name) for tenant in tenants
        ]
        operator = [bytes.fromhex(metrics_key_sha256)] if metrics_key_sha256 else []
        self._metrics_keys = [*self._keys, *((key, None) for key in operator)]
        self._visible = {tenant.name: _visible(tenant, models) for tenant in tenants}
        self._everything = _index(models)
        if len({key for key, _ in self._metrics_keys}) < len(self._metrics_keys):
            raise ConfigError("tenants: two have the same key_sha256, or the metrics'; give each its own key")
        if len(self._visible) < len(tenants):
            raise ConfigError("tenants: two of them have the same name; give each its own")

    def authenticate(self, authorization: str | None, *, metrics: bool = False) -> str | None:
        """The tenant of an `Authorization` header; None, who sees everything, if there are no tenants at all.

        With `metrics`, for the metrics alone, the operator's key is good too and gives None.

        Raises:
            RequestError: 401, the same for a missing and a wrong key.
        """
        if not self._keys:
            return None
        scheme, _, key = (authorization or "").partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        # Every key is compared, in constant time each, so that the time tells nothing.
        keys = self._metrics_keys if metrics else self._keys
        found = [name for known, name in keys if hmac.compare_digest(known, digest)]
        if not found or scheme.lower() != "bearer":
            raise RequestError("the API key is missing or not valid", status=401, code="invalid_api_key")
        return found[0]

    def models(self, tenant: str | None) -> list[ServedModel]:
        """What a tenant sees, each once."""
        return list(dict.fromkeys(self._names(tenant).values()))

    def find(self, tenant: str | None, name: str) -> ServedModel:
        """The model of a name. A foreign and an unknown one give the same 404 (`RequestError`)."""
        model = self._names(tenant).get(name)
        if model is None:
            message = f"The model `{name[:100]}` does not exist or you do not have access to it."
            raise RequestError(message, status=404, code="model_not_found", param="model")
        return model

    def _names(self, tenant: str | None) -> dict[str, ServedModel]:
        return self._everything if tenant is None else self._visible[tenant]


def _visible(tenant: TenantConfig, models: Sequence[ServedModel]) -> dict[str, ServedModel]:
    allowed = [model for model in models if model.folder is None or _allows(tenant, model)]
    for name in tenant.deltas:
        if not any(name in _names_of(model) for model in models):
            raise ConfigError(f"tenants.{tenant.name}.deltas: {name!r} is not served; add it to `deltas`")
    return _index(allowed)


def _index(models: Sequence[ServedModel]) -> dict[str, ServedModel]:
    """Models by the names a request may use: as served, and by exact version. The base has one name."""
    by_id = {model.id: model for model in models}
    return by_id | {model.ref: model for model in models if model.folder is not None} | by_id


def _allows(tenant: TenantConfig, model: ServedModel) -> bool:
    return any(name in _names_of(model) for name in tenant.deltas)


def _names_of(model: ServedModel) -> tuple[str, ...]:
    """A tenant may be given a delta by its name alone, as served, or by its exact version."""
    return (model.id, model.ref, model.ref.partition("@")[0])

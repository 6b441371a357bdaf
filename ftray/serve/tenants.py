"""Who asks, and which models they may use."""

import datetime
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from ftray.config.tenant import SCOPES, Scope, TenantConfig
from ftray.core.errors import ConfigError, RequestError
from ftray.serve.backend import ServedModel

BASE = "base"
"""What a request calls the base model."""


@dataclass(frozen=True)
class Caller:
    """Who a request comes from."""

    tenant: TenantConfig | None
    """None: no keys are asked for, or it is the operator's, good for the metrics alone."""
    scopes: frozenset[Scope]
    """What the key is good for."""

    @property
    def name(self) -> str:
        """The tenant's name; empty if there is none."""
        return self.tenant.name if self.tenant else ""


EVERYBODY = Caller(None, frozenset(SCOPES))
"""Who asks where no keys are asked for."""
_OPERATOR = Caller(None, frozenset({"metrics"}))


@dataclass(frozen=True)
class _Key:
    digest: bytes
    caller: Caller
    expires_at: float


class Access:
    """Keys to tenants, tenants to models.

    Args:
        tenants: who may ask.
        models: what is served.
        metrics_key_sha256: of the operator's key, good for the metrics alone.
        keys: whether keys are asked for; None: if there are tenants. Without, everybody sees everything.

    Raises:
        ConfigError: if two tenants cannot be told apart.
    """

    def __init__(
        self,
        tenants: Sequence[TenantConfig],
        models: Sequence[ServedModel],
        metrics_key_sha256: str | None = None,
        *,
        keys: bool | None = None,
    ) -> None:
        self.tenants = list(tenants)
        self._names = frozenset(tenant.name for tenant in tenants)
        self._open = not (tenants if keys is None else keys)
        self._keys = [_key for tenant in tenants for _key in _keys_of(tenant)]
        if metrics_key_sha256:
            self._keys.append(_Key(bytes.fromhex(metrics_key_sha256), _OPERATOR, float("inf")))
        self._by_name = _index(models)
        if len({key.digest for key in self._keys}) < len(self._keys):
            raise ConfigError("tenants: two have the same key, or the metrics'; give each its own key")
        if len(self._names) < len(tenants):
            raise ConfigError("tenants: two of them have the same name; give each its own")

    def is_tenant(self, name: str) -> bool:
        """Whether a tenant has this name."""
        return name in self._names

    def check_deltas(self) -> None:
        """Refuse tenants whose deltas are not served (`ConfigError`)."""
        for tenant in self.tenants:
            for name in tenant.deltas:
                if not any(name in _grants(model) for models in self._by_name.values() for model in models):
                    raise ConfigError(
                        f"tenants.{tenant.name}.deltas: {name!r} is not served; add it to `deltas`"
                    )

    def authenticate(self, authorization: str, scope: Scope | None) -> Caller:
        """Who an `Authorization` header stands for.

        Args:
            authorization: the header; empty if there is none.
            scope: what is wanted; None: something no key of a tenant is refused.

        Raises:
            RequestError: 401, the same for a missing, a wrong and an expired key; 403 for one without the scope.
        """
        if self._open:
            return EVERYBODY
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        now = datetime.datetime.now(datetime.UTC).timestamp()
        # Every key is compared, in constant time each, so that the time tells nothing.
        found = [known for known in self._keys if hmac.compare_digest(known.digest, digest)]
        caller = found[0].caller if found and now < found[0].expires_at else None
        foreign = caller is _OPERATOR and scope != "metrics"
        if caller is None or foreign or scheme.lower() != "bearer":
            raise RequestError("the API key is missing or not valid", status=401, code="invalid_api_key")
        if scope is not None and scope not in caller.scopes:
            message = f"this API key is not good for {scope}; use one with that scope"
            raise RequestError(message, status=403, code="insufficient_scope")
        return caller

    def models(self, caller: Caller) -> list[ServedModel]:
        """What a caller sees, each once."""
        models = (model for models in self._by_name.values() for model in models)
        return list(dict.fromkeys(model for model in models if _allows(caller, model)))

    def find(self, caller: Caller, name: str) -> ServedModel:
        """The model of a name. A foreign and an unknown one give the same 404 (`RequestError`)."""
        for model in self._by_name.get(name, ()):
            if _allows(caller, model):
                return model
        message = f"The model `{name[:100]}` does not exist or you do not have access to it."
        raise RequestError(message, status=404, code="model_not_found", param="model")


def _keys_of(tenant: TenantConfig) -> list[_Key]:
    """Keys with what they are good for."""
    return [
        _Key(bytes.fromhex(key.sha256), Caller(tenant, frozenset(key.scopes)), key.expires_at_s)
        for key in tenant.all_keys
    ]


def _index(models: Sequence[ServedModel]) -> dict[str, list[ServedModel]]:
    """Models by the names a request may use: as served, then by exact version. The base has one name."""
    index: dict[str, list[ServedModel]] = {model.id: [model] for model in models}
    for model in models:
        if not model.is_base and model.ref != model.id:
            index.setdefault(model.ref, []).append(model)
    return index


def _allows(caller: Caller, model: ServedModel) -> bool:
    if caller.tenant is None or model.is_base:
        return True
    return any(name in caller.tenant.deltas for name in _grants(model))


def _grants(model: ServedModel) -> tuple[str, ...]:
    """A tenant may be given a delta by its name alone, as served, or by its exact version."""
    return (model.id, model.ref, model.name)

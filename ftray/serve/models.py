"""From a serve configuration to the models it serves, checked before anything is started."""

from collections.abc import Sequence
from pathlib import Path

from ftray.config.serve import ServeConfig
from ftray.core.errors import ConfigError, DeltaError
from ftray.delta import manifest
from ftray.engine.api import Engine
from ftray.registry.local import VERSION_FILE, Registry
from ftray.serve.backend import ServedModel
from ftray.serve.tenants import BASE, Access


def resolve_models(config: ServeConfig) -> list[ServedModel]:
    """The base and the deltas of a configuration.

    Raises:
        ModelError: if the base is not a model.
        RegistryError: for an unknown reference or a damaged version.
        DeltaError: for a delta of another base or chat template.
        ConfigError: for a name that is served twice, or a tenant's delta that is not.
    """
    from ftray.engine.base import DeltaGate
    from ftray.model.folder import resolve_folder

    folder = resolve_folder(config.base)
    gate = DeltaGate(folder, config.engine.load_tokenizer(config.base))
    identity = gate.identity
    models = [ServedModel(id=BASE, ref=identity["name"], digest=identity["digest"])]
    registry = Registry(config.registry)
    for ref in config.deltas:
        entry = registry.resolve(ref)
        try:
            gate.check(entry.path)
        except DeltaError as error:
            raise DeltaError(f"deltas: {entry.ref}: {error}") from None
        path = str(entry.path.resolve())
        models.append(ServedModel(id=ref, ref=entry.ref, digest=entry.digest, folder=path))
    ids = [model.id for model in models]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise ConfigError(f"deltas: {twice!r} is served twice; list it once")
    Access(config.tenants, models, config.metrics_key_sha256)
    return models


def load_models(engine: Engine, models: Sequence[ServedModel]) -> None:
    """Load every served delta under its digest, once, if its folder still holds what has that digest.

    Raises:
        DeltaError: if it does not, has no manifest, or is refused by the engine.
    """
    for model in models:
        if model.folder is None:
            continue
        found = manifest.read(Path(model.folder), beside=frozenset({VERSION_FILE})).digest
        if found != model.digest:
            raise DeltaError(
                f"{model.folder}: holds {found}, but {model.ref} is {model.digest}; publish it anew"
            )
        if model.digest not in engine.deltas():
            engine.load_delta(model.digest, model.folder)

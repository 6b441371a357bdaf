"""From references to the models that are served: what they mean in the registry now, checked against the base."""

from collections.abc import Callable
from pathlib import Path

from ftray.config.serve import ServeConfig
from ftray.core.errors import ConfigError, DeltaError, FtrayError
from ftray.registry.ref import parse_ref
from ftray.registry.registry import Registry, Stamp
from ftray.serve.backend import ServedModel
from ftray.serve.errors import is_passing
from ftray.serve.tenants import BASE, Access

_MAX_CHECKED = 10_000
"""Most versions whose check is remembered."""


class Follower:
    """Follows a registry: which version each reference means, looked up only when something has changed.

    Args:
        registry: the registry.
        check: refuses the folder of a delta that this base cannot serve (`DeltaError`).
    """

    def __init__(self, registry: Registry, check: Callable[[Path], object]) -> None:
        self._registry = registry
        self._check = check
        self._known: dict[str, tuple[Stamp, list[ServedModel]]] = {}
        self._checked: dict[str, str | None] = {}

    def models(self, ref: str) -> list[ServedModel]:
        """What a reference means now: `name` stands for its newest version, and for every alias as `name@alias`.

        Raises:
            RegistryError: for an unknown reference or a damaged version.
            DeltaError: for a delta of another base or chat template.
        """
        name = parse_ref(ref).name
        stamp = self._registry.stamps([name])[name]
        known = self._known.get(ref)
        if known is None or known[0] != stamp:
            known = (stamp, [self._model(word) for word in self._words(ref)])
            self._known[ref] = known
        return known[1]

    def _words(self, ref: str) -> list[str]:
        parsed = parse_ref(ref)
        if parsed.version is not None or parsed.alias is not None:
            return [ref]
        return [ref, *(f"{ref}@{alias}" for alias in self._registry.aliases(ref))]

    def _model(self, word: str) -> ServedModel:
        entry = self._registry.show(word)
        if entry.ref not in self._checked:
            # Once for each version: its files are read to be checked, and never change.
            try:
                self._check(self._registry.resolve(entry.ref).path)
                self._checked[entry.ref] = None
            except FtrayError as error:
                if is_passing(error):
                    raise
                self._checked[entry.ref] = str(error)
            if len(self._checked) > _MAX_CHECKED:
                del self._checked[next(iter(self._checked))]
        if problem := self._checked[entry.ref]:
            raise DeltaError(f"deltas: {entry.ref}: {problem}")
        return ServedModel(id=word, ref=entry.ref, digest=entry.digest)


def base_model(config: ServeConfig) -> ServedModel:
    """The base under the name requests use. Raises `ModelError` if it is none."""
    from ftray.model.folder import resolve_folder
    from ftray.model.identity import base_identity

    identity = base_identity(resolve_folder(config.base))
    return ServedModel(id=BASE, ref=identity["name"], digest=identity["digest"], is_base=True)


def follower(config: ServeConfig) -> Follower:
    """What follows the registry of a configuration."""
    from ftray.engine.base import DeltaGate
    from ftray.model.folder import resolve_folder

    gate = DeltaGate(resolve_folder(config.base), config.engine.load_tokenizer(config.base))
    return Follower(Registry(config.registry), gate.check)


def resolve_models(config: ServeConfig) -> list[ServedModel]:
    """The base and the deltas of a configuration, checked before anything is started.

    Raises:
        ModelError: if the base is not a model.
        RegistryError: for an unknown reference or a damaged version.
        DeltaError: for a delta of another base or chat template.
        ConfigError: for a name that is served twice, or a tenant's delta that is not.
    """
    if len(set(config.deltas)) < len(config.deltas):
        twice = next(name for name in config.deltas if config.deltas.count(name) > 1)
        raise ConfigError(f"deltas: {twice!r} is served twice; list it once")
    follow = follower(config)
    deltas = [model for ref in config.deltas for model in follow.models(ref)]
    models = list(dict.fromkeys([base_model(config), *deltas]))
    Access(config.tenants, models, config.metrics_key_sha256).check_deltas()
    return models


def bring(registry: Registry, model: ServedModel) -> str:
    """The folder of a served delta on this machine, whole and with the digest that was promised.

    Raises:
        RegistryError: if it is gone or damaged.
        DeltaError: if it holds another delta.
    """
    entry = registry.resolve(model.ref)
    if entry.digest != model.digest:
        raise DeltaError(
            f"{entry.path}: holds {entry.digest}, but {model.ref} is {model.digest}; publish it anew"
        )
    return str(entry.path.resolve())

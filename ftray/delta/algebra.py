"""Deltas calculated from deltas, offline: one tensor at a time from safetensors to safetensors.

Every result names its parents and how it was made; what it cannot hold is measured and written down.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ftray.adapt.lora_files import Adapter, put_adapter, save_adapter
from ftray.config.recipe import ModelConfig
from ftray.core.errors import DeltaError, ModelError
from ftray.core.fs import commit_dir
from ftray.core.spec import dump
from ftray.core.types import Progress, no_progress
from ftray.delta import manifest
from ftray.delta.combine.base import Combination
from ftray.delta.factors import Errors, Pair, factorise, join, pad, truncate
from ftray.delta.manifest import Delta
from ftray.delta.source import Sites, Source
from ftray.model.build import DTYPES, build_structure
from ftray.model.convert import find_origins, read
from ftray.model.folder import load_config, resolve_folder, weight_map
from ftray.model.identity import base_identity
from ftray.model.save import save_model
from ftray.model.tokenizer import chat_template_hash, load_tokenizer

Kind = Literal["low_rank", "replacement"]


@dataclass(frozen=True)
class Parent:
    """A delta to calculate with."""

    folder: Path
    delta: Delta
    """Its manifest, read and verified."""
    name: str = ""
    """How the result names it, `name@3`; else by its digest."""


@dataclass(frozen=True)
class _Job:
    """What a result is made of."""

    combination: Combination
    sites: Sites
    sources: list[Source]
    base: Path
    rank: int | None
    dtype: torch.dtype
    progress: Progress

    def changes(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
        """Each parameter's name, the base's weight in float32, and the combined change (None: there is none)."""
        origins = find_origins(self.sites.model, weight_map(self.base))
        names = [name for name, _ in self.sites.model.named_parameters()]
        for number, name in enumerate(names):
            if name not in origins:
                raise ModelError(f"{self.base}: no weights for `{name}`; is the base complete?")
            weight = read(origins[name], self.sites.model, torch.float32)
            found = [source.change(name, weight) for source in self.sources]
            self.progress(number, len(names))
            if all(change is None for change in found):
                yield name, weight, None
                continue
            whole = [torch.zeros_like(weight) if change is None else change for change in found]
            yield name, weight, self.combination.combine(whole)


def derive(
    combination: Combination,
    parents: Sequence[Parent],
    base: str,
    into: Path,
    *,
    kind: Kind | None = None,
    rank: int | None = None,
    dtype: str | None = None,
    progress: Progress = no_progress,
) -> Delta:
    """Calculate a delta and write it as a delta folder.

    Args:
        combination: how the parents' changes become one.
        parents: what to calculate with, all of one base.
        base: folder or Hub id of that base.
        into: the folder to write; must be new.
        kind: of the result; low-rank if all parents are, else replacement weights.
        rank: of a low-rank result; its error is recorded. None: as much as loses nothing.
        dtype: of replacement weights, `float32` or `bfloat16`; None: the base's. Calculation is in float32.
        progress: called with parameters done and their number.

    Raises:
        DeltaError: if the parents do not belong together or to the base, are damaged, or `rank` is needed.
        ConfigError: if the combination does not take so many.
    """
    if into.exists():
        raise DeltaError(f"{into}: is there already; name a new folder")
    folder = resolve_folder(base)
    identity, template = base_identity(folder), _check_parents(parents, base_identity(folder))
    dtype = dtype or ("bfloat16" if str(load_config(folder).dtype) == "torch.bfloat16" else "float32")
    structure = build_structure(ModelConfig(model_name_or_path=str(folder), dtype=dtype))  # type: ignore[arg-type]
    sites = Sites(structure, folder)
    sources = [sites.open(parent.folder, parent.delta.kind) for parent in parents]
    combination.weights(len(sources))
    kind = kind or ("low_rank" if rank or all(s.pairs() is not None for s in sources) else "replacement")
    job = _Job(combination, sites, sources, folder, rank, DTYPES[dtype], progress)
    with commit_dir(into) as tmp:
        errors = _WRITERS[kind](job, tmp, base)
        tokenizer = load_tokenizer(_tokenizer_folder(parents, folder))
        tokenizer.save_pretrained(tmp)
        settings = {"rank": rank, "dtype": dtype}
        return manifest.write(
            tmp,
            kind=kind,
            base=identity,
            chat_template_hash=template or chat_template_hash(tokenizer),
            lineage=_lineage(parents),
            derivation=_named(combination) | settings | {"relative_errors": errors.by_tensor},
            metrics={"relative_error": errors.overall} if errors.by_tensor else {},
        )


def _write_replacement(job: _Job, into: Path, base: str) -> Errors:
    """Every weight of the base with its change, as `save_pretrained` lays them out."""
    del base
    tensors = (
        (name, (weight if change is None else weight + change).to(job.dtype))
        for name, weight, change in job.changes()
    )
    with torch.no_grad():
        save_model(job.sites.model, tensors, into)
    return Errors()


def _write_low_rank(job: _Job, into: Path, base: str) -> Errors:
    """Factors in PEFT's layout."""
    errors = Errors()
    exact = _joined(job)
    with torch.no_grad():
        if exact is None:
            pairs = _decomposed(job, errors)
        else:
            pairs = {name: _cut(job, name, pair, errors) for name, pair in exact.items()}
    if not pairs:
        raise DeltaError(f"{into.name}: no linear layer changes, so there is nothing to hold as low rank")
    r = max(a.shape[-2] for a, _ in pairs.values())
    stacks = frozenset(place for place, (a, _) in pairs.items() if a.ndim == 3)
    # One rank everywhere and a scale of 1: readers other than PEFT know no rank by layer.
    adapter = Adapter({place: pad(pair, r) for place, pair in pairs.items()}, stacks, r, False)
    put_adapter(job.sites.model, "result", adapter)
    save_adapter(job.sites.model, "result", into, base, r=r, lora_alpha=r)
    return errors


_WRITERS: dict[Kind, Callable[[_Job, Path, str], Errors]] = {
    "low_rank": _write_low_rank,
    "replacement": _write_replacement,
}


def _joined(job: _Job) -> dict[str, Pair] | None:
    """Factors whose ranks add up, if the result is a weighted sum of factors."""
    weights = job.combination.weights(len(job.sources))
    found = [source.pairs() for source in job.sources]
    known = [pairs for pairs in found if pairs is not None]
    if weights is None or len(known) < len(found):
        return None
    joined: dict[str, Pair] = {}
    for place in sorted({place for pairs in known for place in pairs}):
        mine = [
            (pairs[place], weight) for pairs, weight in zip(known, weights, strict=True) if place in pairs
        ]
        joined[place] = join([pair for pair, _ in mine], [weight for _, weight in mine])
    return joined


def _cut(job: _Job, place: str, pair: Pair, errors: Errors) -> Pair:
    """Factors of the rank that was asked for, if that is less."""
    if job.rank is None or pair[0].shape[-2] <= job.rank:
        return pair
    a, b = truncate(pair, job.rank)
    whole = pair[1] @ pair[0]
    errors.add(place, whole - b @ a, whole)
    return a, b


def _decomposed(job: _Job, errors: Errors) -> dict[str, Pair]:
    """Factors of the changes of linear layers; what changes elsewhere is lost and counted as such."""
    rank = job.rank or _sum_of_ranks(job.sources)
    pairs: dict[str, Pair] = {}
    for name, _, change in job.changes():
        if change is None or not change.any():
            continue
        layer = job.sites.served.get(name)
        if layer is None:
            errors.add(name, change, change)
            continue
        matrix = layer.matrix(change)
        a, b = factorise(matrix, rank)
        errors.add(name, matrix - b @ a, matrix)
        pairs[layer.place] = a, b
    return pairs


def _sum_of_ranks(sources: Sequence[Source]) -> int:
    found = [source.pairs() for source in sources]
    ranks = [max(a.shape[-2] for a, _ in pairs.values()) for pairs in found if pairs]
    if len(ranks) < len(found):
        raise DeltaError("rank: needed to hold replacement weights as low rank; give one, 64 for a start")
    return sum(ranks)


def _check_parents(parents: Sequence[Parent], identity: Mapping[str, Any]) -> str:
    """The chat template they share, empty if none says one."""
    if not parents:
        raise DeltaError("name at least one delta")
    for parent in parents:
        with _naming(parent):
            manifest.check_base(parent.delta, dict(identity))
    templates = {parent.delta.chat_template_hash for parent in parents} - {""}
    if len(templates) > 1:
        raise DeltaError(
            f"these deltas were trained under {len(templates)} chat templates ({', '.join(sorted(templates))}); "
            "their sum fits none"
        )
    return next(iter(templates), "")


@contextlib.contextmanager
def _naming(parent: Parent) -> Iterator[None]:
    try:
        yield
    except DeltaError as error:
        raise DeltaError(f"{parent.name or parent.folder}: {error}") from None


def _lineage(parents: Sequence[Parent]) -> dict[str, Any]:
    known = [parent.delta.lineage for parent in parents]
    return {
        "parents": [parent.name or parent.delta.digest for parent in parents],
        "data": list(dict.fromkeys(digest for one in known for digest in one.data)),
        "sources": {file: digest for one in known for file, digest in one.sources.items()},
    }


def _named(combination: Combination) -> dict[str, Any]:
    settings = dump(combination)
    return {"method": settings.pop("type", type(combination).__name__), "settings": settings}


def _tokenizer_folder(parents: Sequence[Parent], base: Path) -> Path:
    own = (parent.folder for parent in parents if (parent.folder / "tokenizer_config.json").is_file())
    return next(own, base)

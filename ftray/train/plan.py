"""`ftray plan`: what a run will be, before anything is allocated."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ftray.config.recipe import Recipe
from ftray.core.errors import ConfigError
from ftray.core.spec import replace
from ftray.data.source import find_sources
from ftray.model.build import build_structure
from ftray.model.precision import KERNEL_BYTES
from ftray.train.memory import Memory, step_memory
from ftray.train.sample import sample_source

_SAMPLED_FILES = 4
_MOST_ADVICE = 2
_BUCKET_BYTES = 64 << 20
"""A flat piece of gradients that ranks sum at a time."""

PARTS = ("weights", "gradients", "optimizer", "activations", "logits")
# Peak resident memory over what the imports take, against the bytes counted beside the weights: fitted on the
# configurations that `python -m benchmarks.plan` does not hold out. An allocator keeps holes; bfloat16 products
# make packed copies. What their kernels take (`KERNEL_BYTES`) is counted apart: it depends on no size of the model.
FACTOR = {"float32": 1.15, "bfloat16": 1.19}
OVERHEAD_BYTES = 20 << 20


@dataclasses.dataclass(frozen=True)
class Rows:
    """What the training rows are like, from the beginnings of the first files."""

    per_epoch: int
    """Packed rows, about."""
    mean_tokens: float
    """Tokens in one of them."""
    micro_batch_tokens: int
    """Tokens in the fullest micro batch, about."""
    targets_fraction: float
    """Tokens whose prediction is learnt."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run in numbers; bytes are of one rank."""

    parameters: int
    """Of the model and its adapter."""
    trainable: int
    """Parameters that train."""
    rows_per_epoch: int
    """Packed rows, about."""
    tokens_per_step: int
    """Tokens in an optimiser step over all ranks, about."""
    steps: int | None
    """Optimiser steps; None if only the clock ends the run."""
    checkpoint_bytes: int
    """Size of one checkpoint."""
    num_workers: int
    """Ranks."""
    bf16: bool
    """Computed in bfloat16, as far as can be told."""
    memory: Memory
    """The parts at the fullest moment."""
    peak_bytes: int
    """Predicted peak of a rank's process, without the libraries themselves."""


def plan(recipe: Recipe) -> Plan:
    """Plan a recipe: structure and rows are looked at, nothing is trained.

    Raises:
        FtrayError: what would stop the run, as far as it is met.
    """
    recipe.require_own_loop("`ftray plan`")
    rows = look_at_rows(recipe)
    model: Any = build_structure(recipe.model, empty=True)
    recipe.adapt.apply(model, recipe.seed)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    bf16, memory, peak = predict_memory(recipe, rows)
    limits = recipe.train
    steps = limits.max_steps
    if limits.num_train_epochs is not None:
        steps = math.ceil(limits.num_train_epochs * rows.per_epoch / limits.global_batch_size)
    if limits.max_tokens is not None:
        steps = math.ceil(limits.max_tokens / (rows.mean_tokens * limits.global_batch_size))
    return Plan(
        parameters=sum(size for size, _ in sizes),
        trainable=sum(size for size, trains in sizes if trains),
        rows_per_epoch=rows.per_epoch,
        tokens_per_step=round(rows.mean_tokens * limits.global_batch_size),
        steps=steps,
        checkpoint_bytes=memory.trained + memory.state,
        num_workers=workers(recipe),
        bf16=bf16,
        memory=memory,
        peak_bytes=peak,
    )


def workers(recipe: Recipe) -> int:
    """Ranks of a run; of an elastic one the fewest, which hold the most."""
    found = recipe.strategy.num_workers
    return int(found if isinstance(found, int) else min(found))


def look_at_rows(recipe: Recipe) -> Rows:
    """Estimate the rows from the beginnings of a few files."""
    sources = find_sources(recipe.data.train, recipe.data.sample_by)
    samples = [sample_source(recipe, source) for source in sources[:_SAMPLED_FILES]]
    lengths = np.concatenate([np.asarray(sample.row_lengths) for sample in samples])
    seen = sum(source.size_bytes * s.fraction for source, s in zip(sources, samples, strict=False))
    grown = sum(source.size_bytes for source in sources) / max(1.0, seen)
    counts = [sample.manifest["counts"] for sample in samples]
    tokens = sum(count["tokens"] for count in counts)
    return Rows(
        per_epoch=max(1, round(len(lengths) * grown)),
        mean_tokens=float(lengths.mean()),
        micro_batch_tokens=_fullest(lengths, recipe.train.per_device_train_batch_size, recipe.seed),
        targets_fraction=_targets_fraction(recipe, sum(count["targets"] for count in counts), tokens),
    )


def _targets_fraction(recipe: Recipe, targets: int, tokens: int) -> float:
    """Counts are of the rows' answers; some objectives learn prompts too."""
    return 1.0 if recipe.objective.every_token else targets / max(1, tokens)


def predict_memory(recipe: Recipe, rows: Rows) -> tuple[bool, Memory, int]:
    """Precision, parts on one rank and predicted peak bytes of its process."""
    limits, world = recipe.train, workers(recipe)
    bf16 = has_fast_bf16() if limits.bf16 == "auto" else limits.bf16
    tokens = rows.micro_batch_tokens
    targets = max(1, math.ceil(tokens * rows.targets_fraction))
    accumulates = limits.global_batch_size > world * limits.per_device_train_batch_size

    def step(bf16: bool) -> Memory:
        whole = step_memory(
            recipe, num_tokens=tokens, num_targets=targets, bf16=bf16, accumulates=accumulates
        )
        return _of_a_rank(recipe, whole, world)

    memory = step(bf16)
    most = _resident(memory, memory.peak, bf16)
    if bf16 and limits.bf16 == "auto":
        # Both precisions are timed before the first step, when there is no optimiser state yet.
        timed = step(False)
        most = max(most, _resident(timed, timed.peak - timed.optimizer, False))
    return bf16, memory, most


def _resident(memory: Memory, counted: int, bf16: bool) -> int:
    """Resident bytes of a process that holds so many counted ones, the weights among them."""
    factor = FACTOR["bfloat16" if bf16 else "float32"]
    kernels = KERNEL_BYTES if bf16 and not torch.cuda.is_available() else 0
    return round(memory.weights + factor * (counted - memory.weights) + kernels + OVERHEAD_BYTES)


def _of_a_rank(recipe: Recipe, memory: Memory, world: int) -> Memory:
    """Memory of one rank: what the strategy shards is divided, what ranks sum is there twice for a moment."""
    sharded = _shards(recipe)
    has_masters = "masters" in sharded
    if world == 1 and not has_masters:
        return memory
    trained_is_whole = "whole_matrices" in getattr(recipe.adapt, "supplies", ())
    weights, gradients, optimizer = memory.weights, memory.gradients, memory.optimizer
    own = memory.trained
    if "weights" in sharded:
        own = memory.trained if trained_is_whole else memory.trained // world
        weights = min(weights, (weights - memory.trained) // world + own + memory.gathered)
    if "gradients" in sharded and (has_masters or not trained_is_whole):
        gradients //= world
    if has_masters:
        optimizer += memory.masters
    if "optimizer" in sharded and (has_masters or not trained_is_whole):
        optimizer //= world
    passes = weights + gradients + optimizer + memory.logits + memory.activations
    # Replicated gradients are summed when the activations are gone: they are there twice, and a piece again.
    summed = 0 if "gradients" in sharded else 2 * own + min(_BUCKET_BYTES, own)
    peak = max(passes, weights + optimizer + summed)
    return dataclasses.replace(memory, weights=weights, gradients=gradients, optimizer=optimizer, peak=peak)


def _shards(recipe: Recipe) -> frozenset[str]:
    """What the strategy says it divides; one of a user's own may not say."""
    found: frozenset[str] | None = getattr(recipe.strategy, "shards", None)
    if found is None:
        raise ConfigError(
            f"strategy: `{type(recipe.strategy).__name__}` does not say what it divides; add the property `shards`"
        )
    return found


def _fullest(lengths: Any, micro_batch_size: int, seed: int) -> int:
    """Tokens of the fullest of many micro batches drawn from the rows."""
    drawn = np.random.default_rng(seed).choice(lengths, size=(256, micro_batch_size))
    return int(drawn.sum(1).max())


def has_fast_bf16() -> bool:
    """True where bfloat16 is the faster precision as far as the hardware says."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def what_fits(recipe: Recipe, rows: Rows, budget_bytes: int) -> list[str]:
    """Changes to a recipe, the smallest first, with which a rank is predicted to stay within a budget."""
    found: list[str] = []
    for changes in _changes(recipe):
        if len(found) == _MOST_ADVICE:
            break
        smaller = recipe
        for field, value in changes.items():
            smaller = replace(smaller, field, value)
        needed = predict_memory(smaller, scaled(rows, recipe, smaller))[2]
        if needed <= budget_bytes:
            words = " ".join(f"{field}={_word(value)}" for field, value in changes.items())
            found.append(f"{words} ({gib(needed)})")
    return found


def scaled(rows: Rows, recipe: Recipe, other: Recipe) -> Rows:
    """The same rows in micro batches of another size."""
    ratio = other.train.per_device_train_batch_size / recipe.train.per_device_train_batch_size
    return dataclasses.replace(rows, micro_batch_tokens=math.ceil(rows.micro_batch_tokens * ratio))


def _changes(recipe: Recipe) -> Sequence[dict[str, Any]]:
    micro, one = "train.per_device_train_batch_size", {"train.per_device_train_batch_size": 1}
    size = recipe.train.per_device_train_batch_size
    halves = [{micro: size >> n} for n in range(1, size.bit_length()) if size >> n >= 1]
    again = {"train.gradient_checkpointing": True}
    less: list[dict[str, Any]] = [*halves, again, {**one, **again}]
    if recipe.adapt.facts().kind == "replacement":
        less += [{"adapt": "lora"}, {"adapt": "lora", **one, **again}]
    return [change for change in less if not _is_so(recipe, change)]


def _is_so(recipe: Recipe, change: dict[str, Any]) -> bool:
    train = {field.removeprefix("train."): value for field, value in change.items() if field != "adapt"}
    return "adapt" not in change and all(
        getattr(recipe.train, name) == value for name, value in train.items()
    )


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def gib(size: float) -> str:
    """Bytes in words, as `1.25 GiB`, `310 MiB` or `12 KiB`."""
    if size >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.0f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"


def lines_of(found: Plan) -> list[str]:
    """A plan in words, a line for each number."""
    steps = "until the clock ends the run" if found.steps is None else f"{found.steps:,}"
    ranks = "1 rank" if found.num_workers == 1 else f"{found.num_workers} ranks"
    # What strategies hold for a moment to exchange gradients and weights is counted in part.
    least = "" if found.num_workers == 1 else "at least "
    precision = "bfloat16 over float32 weights" if found.bf16 else "float32"
    return [
        f"parameters: {found.parameters:,}, {found.trainable:,} train ({found.trainable / found.parameters:.2%})",
        f"rows: about {found.rows_per_epoch:,} an epoch",
        f"tokens per step: about {found.tokens_per_step:,}",
        f"steps: {steps}",
        f"checkpoint: {gib(found.checkpoint_bytes)}",
        f"peak memory: {least}{gib(found.peak_bytes)} a rank over the libraries ({ranks}, {precision})",
        "  of it " + ", ".join(f"{name} {gib(getattr(found.memory, name))}" for name in PARTS),
    ]

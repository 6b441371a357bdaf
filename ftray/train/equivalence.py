"""`ftray check --equivalence`: the losses must not depend on how a step is cut and spread.

The recipe takes some steps in float32 on CPUs several times over: as given, with other micro batches, with its
documents in other rows, on one and two workers, and under every other strategy that goes with the rest of it.
Dropout is off, for its random numbers belong to a shape.
Packing decides which documents share a step, so recipes with and without it see different steps; what can and
must be equal is the loss of the *same* documents in other rows, and that is what is compared.
"""

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ftray.catalog import METHODS
from ftray.config.recipe import Recipe
from ftray.core.errors import ConfigError
from ftray.core.spec import dump, parse, replace
from ftray.data.source import find_sources
from ftray.train.check import check_model
from ftray.train.io import LocalIO
from ftray.train.local_ranks import call_on_ranks
from ftray.train.regroup import apart, joined
from ftray.train.sample import write_rows
from ftray.train.worker import begin

TOLERANCE = 1e-5
_SAMPLED_FILES = 8

Rows = Literal["as given", "apart", "joined"]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to take the same steps."""

    name: str
    recipe: Recipe
    world: int = 1
    rows: Rows = "as given"


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A way that does not go with the rest of the recipe."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far a variant's losses are from the recipe's own."""

    name: str
    relative: float
    """Largest relative difference of a step's loss."""
    losses: list[float]


def compare(recipe: Recipe, steps: int = 10) -> tuple[list[Difference], list[LeftOut]]:
    """Losses of every variant against the recipe in one process, and what was left out.

    The first entry is the recipe in one process itself.

    Only the beginnings of the source files are read, and nothing is left behind.

    Raises:
        FtrayError: what stops a variant.
    """
    recipe.require_own_loop("`ftray check --equivalence`")
    with tempfile.TemporaryDirectory() as folder:
        variants, left_out = variants_of(_shrunk(recipe, Path(folder)))
        found: dict[str, list[float]] = {}
        for world in sorted({variant.world for variant in variants}):
            chosen = [variant for variant in variants if variant.world == world]
            plain = [(dump(variant.recipe), variant.rows) for variant in chosen]
            results = call_on_ranks(world, _losses_of_all, plain, steps)
            found |= dict(zip((variant.name for variant in chosen), results, strict=True))
    reference = found[variants[0].name]
    differences = [
        Difference(variant.name, largest_difference(found[variant.name], reference), found[variant.name])
        for variant in variants
    ]
    return differences, left_out


def variants_of(recipe: Recipe) -> tuple[list[Variant], list[LeftOut]]:
    """What is compared, the recipe in one process first, and what cannot be."""
    alone = replace(recipe, "strategy", "single")
    micro = recipe.train.per_device_train_batch_size
    # Four times the accumulation; where a micro batch is too small to be cut in four, into single rows.
    smaller = max(1, micro // 4) if micro > 1 else min(4, recipe.train.global_batch_size)
    accumulated = replace(alone, "train.per_device_train_batch_size", smaller)
    packing = (
        Variant("packing off: each document alone", alone, rows="apart")
        if recipe.data.packing
        else Variant("packing on: documents joined to rows", alone, rows="joined")
    )
    spread, left_out = _spread(recipe)
    found = [
        Variant("as given, one process", alone),
        Variant(f"micro batches of {smaller} instead of {micro}", accumulated),
        packing,
        *spread,
    ]
    named = [
        dataclasses.replace(variant, recipe=replace(variant.recipe, "name", f"variant-{number}"))
        for number, variant in enumerate(found)
    ]
    return named, left_out


def _spread(recipe: Recipe) -> tuple[list[Variant], list[LeftOut]]:
    """On one and two workers of the recipe's own strategy, and on two of the others that go with the rest of it."""
    own = "ddp" if recipe.strategy.in_process else dump(recipe.strategy)["type"]
    found, left_out = [], []
    for name in (own, *sorted(METHODS["strategy"].keys() - {own})):
        worlds = (1, 2) if name == own else (2,)
        try:
            spread = recipe if dump(recipe.strategy)["type"] == name else replace(recipe, "strategy", name)
            if spread.strategy.in_process:
                continue
            check_model(spread)
        except ConfigError as error:  # pieces that do not go together, a library that is not there
            left_out += [LeftOut(_spread_name(name, world), str(error)) for world in worlds]
            continue
        for world in worlds:
            on = replace(spread, "strategy.num_workers", world)
            found.append(Variant(_spread_name(name, world), on, world))
    return found, left_out


def _spread_name(strategy: str, world: int) -> str:
    return f"{strategy}, {world} worker{'s' if world > 1 else ''}"


def _shrunk(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe over the first rows of its files, in float32, without what only takes time."""
    sources = find_sources(recipe.data.train, recipe.data.sample_by)[:_SAMPLED_FILES]
    files = []
    for number, source in enumerate(sources):
        files.append(folder / f"rows-{number}.jsonl")
        write_rows(source, {str(k): v for k, v in recipe.data.columns.items()}, files[-1])
    tree = dump(recipe)
    tree["data"] |= {
        "train": [str(file) for file in files],
        "validation": [],
        "mixture": [],
        "stream": False,
        "drop_consumed": False,
        "cache_dir": str(folder / "cache"),
    }
    if all(source.is_text for source in sources):
        tree["data"]["columns"] = {}
    keep = ("per_device_train_batch_size", "global_batch_size", "max_grad_norm", "gradient_checkpointing")
    tree["train"] = {key: tree["train"][key] for key in keep} | {"bf16": False, "max_steps": 1000}
    tree |= {"output_dir": str(folder / "runs"), "tracking": []}
    return parse(Recipe, tree)


def _losses_of_all(variants: list[tuple[dict[str, Any], Rows]], steps: int) -> list[list[float]]:
    return [losses_of(parse(Recipe, tree), rows, steps) for tree, rows in variants]


def losses_of(recipe: Recipe, rows: Rows, steps: int) -> list[float]:
    """Losses of the first steps, without dropout, taken by this process's rank."""
    with contextlib.closing(LocalIO(Path(recipe.output_dir) / recipe.name)) as io:
        run = begin(recipe, io, None)
        try:
            for module in run.engine.policy.model.modules():
                _without_dropout(module)
            found = []
            for step in range(steps):
                batches = run.feed.batches(step)
                if rows != "as given":
                    batches = apart(batches) if rows == "apart" else joined(batches, recipe.data.max_length)
                scale = recipe.lr_scheduler.scale(step, step / 1000)
                found.append(run.engine.step(batches, scale).loss)
            return found
        finally:
            run.checkpoints.close()


def _without_dropout(module: Any) -> None:
    if isinstance(module, nn.Dropout):
        module.p = 0.0
    if isinstance(getattr(module, "attention_dropout", None), float):
        module.attention_dropout = 0.0
    if isinstance(getattr(module, "dropout", None), dict):  # an adaptable layer's, by adapter
        module.dropout = dict.fromkeys(module.dropout, 0.0)


def largest_difference(losses: list[float], reference: list[float]) -> float:
    """Largest relative difference of two curves; infinite if a loss of either is not finite."""
    pairs = list(zip(losses, reference, strict=True))
    if not all(math.isfinite(loss) and math.isfinite(known) for loss, known in pairs):
        return math.inf  # `max` would pass over a NaN
    return max(abs(loss - known) / max(abs(known), 1e-12) for loss, known in pairs)


def table(found: list[Difference], left_out: Sequence[LeftOut] = ()) -> list[str]:
    """The comparison in words, a line for each variant."""
    width = max(len(name) for name in (*(row.name for row in found), *(row.name for row in left_out)))
    head = f"{'':{width}}  largest relative difference of {len(found[0].losses)} losses, float32"
    rows = [
        f"{row.name:{width}}  {row.relative:.1e}  {'' if row.relative <= TOLERANCE else '<- differs'}".rstrip()
        for row in found[1:]
    ]
    return [head, *rows, *(f"{row.name:{width}}  left out: {row.reason}" for row in left_out)]

"""`ftray check`: what a run would stumble over, found before any hardware is taken."""

from collections.abc import Iterator
from typing import Any

from ftray.config.recipe import Recipe
from ftray.core.errors import ConfigError
from ftray.data.read import counts_line
from ftray.data.source import Source, find_sources
from ftray.model.build import build_structure
from ftray.model.positions import max_positions
from ftray.model.tokenizer import load_tokenizer
from ftray.train.build import checkpoint_layers
from ftray.train.kind import check_rows
from ftray.train.roles import check_teacher
from ftray.train.sample import SAMPLE_BYTES, sample_source


def check_recipe(recipe: Recipe) -> Iterator[str]:
    """Check a recipe's model, adapter and rows; yields one line of findings for each.

    The model is built on the meta device and no weight is read; of each source file the first 256 KiB
    of rows are parsed, rendered and tokenised.

    Raises:
        FtrayError: one line, for the first thing that would stop the run.
    """
    yield check_model(recipe)
    if recipe.trainer is not None:
        return
    for split in ("train", "validation"):
        if patterns := getattr(recipe.data, split):
            sources = find_sources(patterns, recipe.data.sample_by)
            yield from (_check_source(recipe, split, source) for source in sources)


def check_model(recipe: Recipe) -> str:
    """Check model, adapter and tokenizer against each other on the meta device; returns a line on their size.

    Raises:
        FtrayError: one line, for what would stop the run.
    """
    if recipe.trainer is not None:
        return str(recipe.trainer.check(recipe))
    model: Any = build_structure(recipe.model, empty=True)
    recipe.adapt.apply(model, recipe.seed)
    recipe.objective.extend(model, recipe.seed)
    check_teacher(recipe)
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizers = recipe.optim.build(trainable)  # a pattern that matches nothing is told here
    recipe.strategy.check_optimizers(optimizers)
    if recipe.train.gradient_checkpointing:
        checkpoint_layers(model)
    trained = sum(parameter.numel() for parameter in trainable.values())
    tokens, rows = len(load_tokenizer(recipe.model.tokenizer)), model.get_input_embeddings().weight.shape[0]
    if tokens > rows:
        raise ConfigError(
            f"model.tokenizer_name_or_path: {tokens} tokens, the model has embeddings for {rows}; "
            "use the model's own tokenizer"
        )
    longest = max_positions(model.config)
    if recipe.data.max_length > longest:
        raise ConfigError(
            f"data.max_length: {recipe.data.max_length} is more than the model's {longest} positions (`longrope` "
            "and `dynamic` ones go by the longest document of a batch beyond the original length); set it lower"
        )
    return f"model: {total:,} parameters, {trained:,} train ({trained / total:.2%})"


def _check_source(recipe: Recipe, split: str, source: Source) -> str:
    sample = sample_source(recipe, source)
    check_rows(recipe.objective, [sample.manifest])
    part = "all" if sample.is_whole else f"the first {SAMPLE_BYTES >> 10} KiB of rows"
    return f"data.{split}: {source.file} ({part}): {counts_line(sample.manifest['counts'])}"

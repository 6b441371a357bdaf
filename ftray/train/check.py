"""`ftray check`: what a run would stumble over, found before any hardware is taken."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftray.config.recipe import Recipe
from ftray.core.errors import ConfigError, DataError
from ftray.core.spec import replace
from ftray.data.prepare import QUARANTINE, prepare_local
from ftray.data.read import Shards, counts_line
from ftray.data.source import find_files
from ftray.model.build import build_structure
from ftray.model.tokenizer import load_tokenizer

_SAMPLE_BYTES = 256 << 10


def check_recipe(recipe: Recipe) -> Iterator[str]:
    """Check a recipe's model, adapter and rows; yields one line of findings for each.

    The model is built on the meta device and no weight is read; of each source file the first 256 KiB are parsed,
    rendered and tokenised.

    Raises:
        FtrayError: one line, for the first thing that would stop the run.
    """
    yield check_model(recipe)
    for split in ("train", "validation"):
        if patterns := getattr(recipe.data, split):
            yield from (_check_file(recipe, split, file) for file in find_files(patterns))


def check_model(recipe: Recipe) -> str:
    """Check model, adapter and tokenizer against each other on the meta device; returns a line on their size.

    Raises:
        FtrayError: one line, for what would stop the run.
    """
    model: Any = build_structure(recipe.model, empty=True)
    recipe.adapt.apply(model, recipe.seed)
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    tokens, rows = len(load_tokenizer(recipe.model.tokenizer)), model.get_input_embeddings().weight.shape[0]
    if tokens > rows:
        raise ConfigError(
            f"model.tokenizer_name_or_path: {tokens} tokens, the model has embeddings for {rows}; "
            "use the model's own tokenizer"
        )
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and recipe.data.max_length > longest:
        raise ConfigError(
            f"data.max_length: {recipe.data.max_length} is more than the model's {longest} positions"
        )
    return f"model: {total:,} parameters, {trained:,} train ({trained / total:.2%})"


def _check_file(recipe: Recipe, split: str, file: Path) -> str:
    with tempfile.TemporaryDirectory() as folder:
        sample = Path(folder) / file.name
        with file.open("rb") as source:
            head = source.read(_SAMPLE_BYTES)
            sample.write_bytes(head + source.readline())
        data = replace(replace(recipe.data, "train", [str(sample)]), "cache_dir", folder)
        try:
            counts = Shards(prepare_local(data, recipe.model.tokenizer, "train")).manifest["counts"]
        except DataError as error:
            raise DataError(
                _first_bad_row(Path(folder), file) or str(error).replace(str(sample), str(file))
            ) from None
    part = "all" if _is_whole(file) else f"the first {_SAMPLE_BYTES >> 10} KiB"
    return f"data.{split}: {file} ({part}): {counts_line(counts)}"


def _first_bad_row(cache: Path, file: Path) -> str | None:
    """Where the first row that cannot be used is, and why; the preparation's own message names files of its own."""
    for quarantine in cache.glob(f"train-*/{QUARANTINE}"):
        records = [json.loads(line) for line in quarantine.read_text("utf-8").splitlines()]
        if records:
            first = records[0]
            where = f"line {first['line']} (byte {first['offset']})"
            return f"{file}: {len(records)} rows cannot be used; the first at {where}: {first['reason']}"
    return None


def _is_whole(file: Path) -> bool:
    """True if the sample that is checked is the whole file."""
    return file.stat().st_size <= _SAMPLE_BYTES

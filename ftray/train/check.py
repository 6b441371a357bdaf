"""`ftray check`: what a run would stumble over, found before any hardware is taken."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ftray.config.recipe import Recipe
from ftray.core.errors import ConfigError, DataError
from ftray.core.spec import replace
from ftray.data.formats.base import is_url
from ftray.data.prepare import QUARANTINE, prepare_local
from ftray.data.read import Shards, counts_line
from ftray.data.source import Records, Source, find_sources, split_units
from ftray.model.build import build_structure
from ftray.model.tokenizer import load_tokenizer
from ftray.train.kind import check_rows
from ftray.train.roles import check_teacher

_SAMPLE_BYTES = 256 << 10


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


def _check_source(recipe: Recipe, split: str, source: Source) -> str:
    file = source.file
    with tempfile.TemporaryDirectory() as folder:
        sample = Path(folder) / "rows.jsonl"
        is_whole = _write_sample(source, {str(k): v for k, v in recipe.data.columns.items()}, sample)
        data = replace(replace(recipe.data, "train", [str(sample)]), "cache_dir", folder)
        if source.is_text:
            data = replace(data, "columns", {})
        try:
            manifest = Shards(prepare_local(data, recipe.model.tokenizer, "train")).manifest
        except DataError as error:
            raise DataError(
                _first_bad_row(Path(folder), file) or str(error).replace(str(sample), file)
            ) from None
    check_rows(recipe.objective, [manifest])
    part = "all" if is_whole else f"the first {_SAMPLE_BYTES >> 10} KiB of rows"
    return f"data.{split}: {file} ({part}): {counts_line(manifest['counts'])}"


def _write_sample(source: Source, columns: Mapping[str, str], sample: Path) -> bool:
    """Write the first rows as JSON lines, each in its place if it is one already; true if they are all."""
    with sample.open("wb") as file:
        if source.format == "jsonl" and not source.compression and not is_url(source.file):
            with Path(source.file).open("rb") as lines:
                file.write(lines.read(_SAMPLE_BYTES) + lines.readline())
            return source.size_bytes <= _SAMPLE_BYTES
        for unit in split_units([source]):
            for record in Records(unit, columns):
                if isinstance(record.value, dict | bytes):
                    value = record.value
                    line = value if isinstance(value, bytes) else json.dumps(value, default=str).encode()
                    file.write(b" ".join(line.splitlines()) + b"\n")
                if file.tell() >= _SAMPLE_BYTES:
                    return False
    return True


def _first_bad_row(cache: Path, file: str) -> str | None:
    """Where the first row that cannot be used is, and why; the preparation's own message names files of its own."""
    for quarantine in cache.glob(f"train-*/{QUARANTINE}"):
        records = [json.loads(line) for line in quarantine.read_text("utf-8").splitlines()]
        if records:
            first = records[0]
            where = f"line {first['line']} (byte {first['offset']})"
            return f"{file}: {len(records)} rows cannot be used; the first at {where}: {first['reason']}"
    return None

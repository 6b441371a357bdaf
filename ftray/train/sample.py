"""The first rows of a source file, rendered, tokenised and packed as a run would."""

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftray.config.recipe import DataConfig, Recipe
from ftray.core.errors import DataError
from ftray.core.spec import replace
from ftray.data.formats.base import is_url
from ftray.data.prepare import QUARANTINE, prepare_local
from ftray.data.read import Shards
from ftray.data.source import Records, Source, split_units

SAMPLE_BYTES = 256 << 10


@dataclasses.dataclass(frozen=True)
class Sample:
    """What the first rows of a source file become."""

    manifest: dict[str, Any]
    """Of the prepared rows."""
    row_lengths: list[int]
    """Tokens in each packed row."""
    is_whole: bool
    """They are all rows of the file."""
    fraction: float
    """Part of the file's bytes they are, about."""


def sample_source(recipe: Recipe, source: Source) -> Sample:
    """Prepare the first 256 KiB of a source file's rows in a folder that is removed again.

    Raises:
        DataError: naming the file and the first row that cannot be used, if too many cannot.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        is_whole = write_rows(source, {str(k): v for k, v in recipe.data.columns.items()}, rows)
        try:
            shards = Shards(
                prepare_local(
                    sample_config(recipe.data, [rows], folder, source), recipe.model.tokenizer, "train"
                )
            )
        except DataError as error:
            reason = _first_bad_row(Path(folder), source.file)
            raise DataError(reason or str(error).replace(str(rows), source.file)) from None
        lengths = [len(shards.row(index).input_ids) for index in range(len(shards))]
        fraction = 1.0 if is_whole else min(1.0, rows.stat().st_size / max(1, source.size_bytes))
        return Sample(shards.manifest, lengths, is_whole, fraction)


def sample_config(data: DataConfig, files: list[Path], folder: str, source: Source) -> DataConfig:
    """The recipe's own settings over files that `write_rows` wrote."""
    found = replace(replace(data, "train", [str(file) for file in files]), "cache_dir", folder)
    return replace(found, "columns", {}) if source.is_text else found


def write_rows(source: Source, columns: Mapping[str, str], target: Path) -> bool:
    """Write the first rows as JSON lines, each in its place if it is one already; true if they are all."""
    with target.open("wb") as file:
        if source.format == "jsonl" and not source.compression and not is_url(source.file):
            with Path(source.file).open("rb") as lines:
                file.write(lines.read(SAMPLE_BYTES) + lines.readline())
            return source.size_bytes <= SAMPLE_BYTES
        for unit in split_units([source]):
            for record in Records(unit, columns):
                if isinstance(record.value, dict | bytes):
                    value = record.value
                    line = value if isinstance(value, bytes) else json.dumps(value, default=str).encode()
                    file.write(b" ".join(line.splitlines()) + b"\n")
                if file.tell() >= SAMPLE_BYTES:
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

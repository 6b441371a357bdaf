"""Metrics as JSON lines: `metrics.jsonl` in the run folder."""

import json
from pathlib import Path
from typing import Any

from ftray.config.recipe import Recipe
from ftray.core.fs import write_bytes
from ftray.core.spec import spec
from ftray.core.types import finite

FILE = "metrics.jsonl"


@spec
class Jsonl:
    """One JSON object a record."""

    def open(self, recipe: Recipe, run_dir: Path, from_step: int) -> "JsonlSink":
        """Open for appending; records of steps that will be done again are dropped first."""
        del recipe
        path = run_dir / FILE
        earlier = [record for record in read_records(path) if record["step"] <= from_step]
        kept = [record for record in earlier if not record.get("final")]  # it will be written again
        write_bytes(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        return JsonlSink(path)


class JsonlSink:
    """An open `metrics.jsonl`; each line is on its way to the disk when `log` returns."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def log(self, record: dict[str, Any]) -> None:
        """Append one line."""
        self._file.write(json.dumps(finite(record)) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """All whole records of a metrics file; a torn last line (a killed writer's) is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return [record for record in records if isinstance(record, dict) and "step" in record]

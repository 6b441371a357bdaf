"""Read prepared token shards: memory-mapped, checked against their manifest when opened."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ftray.core.errors import DataError, FtrayError
from ftray.core.fs import read_json, verify_tree

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
IGNORE_INDEX = -100
"""Label of a token that is not a target (the value PyTorch's cross-entropy ignores)."""


@dataclass(frozen=True)
class RowArrays:
    """One packed row: arrays of N tokens that belong to D documents."""

    input_ids: npt.NDArray[np.int32]
    """Token ids, [N]."""
    labels: npt.NDArray[np.int32]
    """The token's own id where it is a target, else -100; not shifted, [N]."""
    weights: npt.NDArray[np.float32]
    """Weight of each target in the loss, 0 where there is none, [N]."""
    doc_lens: npt.NDArray[np.int32]
    """Tokens of each document, in order, [D]; they sum to N."""


@functools.cache
def padding_row() -> RowArrays:
    """The row that fills up a batch which does not divide by the workers: one token, no target."""
    return RowArrays(
        input_ids=np.zeros(1, np.int32),
        labels=np.full(1, IGNORE_INDEX, np.int32),
        weights=np.zeros(1, np.float32),
        doc_lens=np.ones(1, np.int32),
    )


class _Shard:
    """One Arrow file as flat arrays and row offsets."""

    def __init__(self, path: Path) -> None:
        with pa.memory_map(str(path)) as source:
            batch = pa.ipc.open_file(source).get_batch(0)
        self.offsets = _offsets(batch, "input_ids")
        self.doc_offsets = _offsets(batch, "doc_lens")
        self.input_ids, self.labels, self.weights, self.doc_lens = (
            batch.column(name).values.to_numpy() for name in ("input_ids", "labels", "weights", "doc_lens")
        )

    def row(self, index: int) -> RowArrays:
        tokens = slice(self.offsets[index], self.offsets[index + 1])
        docs = slice(self.doc_offsets[index], self.doc_offsets[index + 1])
        return RowArrays(
            self.input_ids[tokens], self.labels[tokens], self.weights[tokens], self.doc_lens[docs]
        )


def _offsets(batch: pa.RecordBatch, column: str) -> npt.NDArray[np.int32]:
    return np.asarray(batch.column(column).offsets.to_numpy())


class Shards:
    """The rows of one prepared data set.

    Args:
        path: a folder made by `prepare`.
        verify: compare every shard with its digest first.

    Raises:
        DataError: one line, if the folder is not a prepared data set or a shard is missing or changed.
    """

    def __init__(self, path: str | Path, *, verify: bool = True) -> None:
        self.path = Path(path)
        self.manifest: dict[str, Any] = read_manifest(self.path)
        if verify:
            verify_tree(self.path, {s["file"]: s["digest"] for s in self.manifest["shards"]}, DataError)
        counts = [shard["rows"] for shard in self.manifest["shards"]]
        self._starts = np.cumsum([0, *counts])
        self._shards: dict[int, _Shard] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def digest(self) -> str:
        """The identity of this data set."""
        return str(self.manifest["digest"])

    def row(self, index: int) -> RowArrays:
        """Row `index` as read-only views of the mapped file; -1 is the padding row."""
        if index == -1:
            return padding_row()
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        if number not in self._shards:
            self._shards[number] = _Shard(self.path / self.manifest["shards"][number]["file"])
        return self._shards[number].row(int(index - self._starts[number]))


def counts_line(counts: dict[str, Any]) -> str:
    """What became of the rows of a data set, in words, from its manifest's counts."""
    filtered, quarantined = sum(counts["filtered"].values()), sum(counts["quarantined"].values())
    return (
        f"{counts['rows']:,} rows, {counts['documents']:,} used, {filtered:,} filtered, "
        f"{quarantined:,} quarantined; {counts['tokens']:,} tokens, {counts['targets']:,} of them targets"
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared data set. Raises `DataError` if there is none of this version."""
    try:
        manifest = read_json(folder / MANIFEST)
    except FtrayError as error:
        raise DataError(
            f"{error}; {folder} is not prepared data, make it with `ftray data prepare`"
        ) from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{folder / MANIFEST}: format version {version} is not {FORMAT_VERSION}; prepare the data again"
        )
    return dict(manifest)

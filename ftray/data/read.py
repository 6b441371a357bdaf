"""Read prepared token shards: memory-mapped, checked against their manifest when opened."""

import bisect
import contextlib
import functools
import posixpath
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ftray.core.errors import DataError
from ftray.core.fs import verify_tree
from ftray.data.cache import NodeCache
from ftray.data.store import Folder, is_url, open_store, split_folder

FORMAT_VERSION = 4
MANIFEST = "manifest.json"
STAMPS = "stamps.json"
"""Sizes and times of the shards when they were last known good."""
IGNORE_INDEX = -100
"""Label of a token that is not a target (the value PyTorch's cross-entropy ignores)."""


class RowArrays(NamedTuple):
    """One packed row: arrays of N tokens that belong to D documents."""

    input_ids: npt.NDArray[np.int32]
    """Token ids, [N]."""
    labels: npt.NDArray[np.int32]
    """The token's own id where it is a target, else -100; not shifted, [N]."""
    weights: npt.NDArray[np.float32]
    """Weight of each target in the loss, 0 where there is none, [N]."""
    doc_lens: npt.NDArray[np.int32]
    """Tokens of each document, in order, [D]; they sum to N."""
    group_lens: npt.NDArray[np.int32]
    """Documents of each group (2: a preference pair), in order, [G]; they sum to D."""


@functools.cache
def padding_row() -> RowArrays:
    """The row that fills up a batch which does not divide by the workers: one token, no target."""
    return RowArrays(
        input_ids=np.zeros(1, np.int32),
        labels=np.full(1, IGNORE_INDEX, np.int32),
        weights=np.zeros(1, np.float32),
        doc_lens=np.ones(1, np.int32),
        group_lens=np.ones(1, np.int32),
    )


class _Shard:
    """One Arrow file as flat arrays and row offsets."""

    def __init__(self, path: Path) -> None:
        with pa.memory_map(str(path)) as source:
            batch = pa.ipc.open_file(source).get_batch(0)
        self.offsets = _offsets(batch, "input_ids")
        self.doc_offsets = _offsets(batch, "doc_lens")
        self.group_offsets = _offsets(batch, "group_lens")
        self.input_ids, self.labels, self.weights, self.doc_lens, self.group_lens = (
            batch.column(name).values.to_numpy()
            for name in ("input_ids", "labels", "weights", "doc_lens", "group_lens")
        )

    def row(self, index: int) -> RowArrays:
        tokens = slice(self.offsets[index], self.offsets[index + 1])
        docs = slice(self.doc_offsets[index], self.doc_offsets[index + 1])
        groups = slice(self.group_offsets[index], self.group_offsets[index + 1])
        return RowArrays(
            self.input_ids[tokens],
            self.labels[tokens],
            self.weights[tokens],
            self.doc_lens[docs],
            self.group_lens[groups],
        )


def _offsets(batch: pa.RecordBatch, column: str) -> list[int]:
    # A list: a number of it is had in a third of the time that one of an array takes.
    offsets: list[int] = batch.column(column).offsets.to_numpy().tolist()
    return offsets


class Shards:
    """The rows of a prepared data set.

    Args:
        path: a folder or URL made by `prepare`.
        verify: compare every shard with its digest first; otherwise each when its first row is read.
        cache: where copies of remote shards are kept on this node; None: the default place.

    Raises:
        DataError: one line, if the folder is not a prepared data set or a shard is missing or changed.
    """

    def __init__(self, path: Folder, *, verify: bool = True, cache: NodeCache | None = None) -> None:
        self._open(path, cache)
        self.manifest: dict[str, Any] = read_manifest(path)
        self._add(self.manifest["shards"])
        if verify and not is_url(path):
            for number in range(len(self.shards)):
                self._file(number)

    def _open(self, path: Folder, cache: NodeCache | None) -> None:
        """An empty data set."""
        self.path: Any = path if is_url(path) else Path(path)
        parent, self._name = split_folder(path)
        self._store = open_store(parent)
        self._cache = (cache or NodeCache()) if is_url(path) else None
        self.shards: list[dict[str, Any]] = []
        """Manifest entries of the shards."""
        self._starts = [0]
        self._mapped: dict[int, _Shard] = {}
        self._good: set[str] = set()

    def _add(self, shards: Sequence[dict[str, Any]]) -> None:
        for shard in shards:
            self.shards.append(shard)
            self._starts.append(self._starts[-1] + shard["rows"])

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def digest(self) -> str:
        """The identity of this data set."""
        return str(self.manifest["digest"])

    def row(self, index: int) -> RowArrays:
        """Row `index` as read-only views of the mapped file; -1 is the padding row."""
        if index == -1:
            return padding_row()
        if not 0 <= index < self._starts[-1]:
            raise IndexError(f"row {index} of {len(self)}")
        number = self.shard_of(index)
        return self._shard(number).row(index - self._starts[number])

    def columns(self, number: int) -> tuple[npt.NDArray[Any], ...]:
        """All rows of a shard end to end, as read-only views: the fields of `RowArrays`."""
        shard = self._shard(number)
        return (shard.input_ids, shard.labels, shard.weights, shard.doc_lens, shard.group_lens)

    def _shard(self, number: int) -> _Shard:
        shard = self._mapped.get(number)
        if shard is None:
            shard = self._mapped[number] = _Shard(self._file(number))
        return shard

    def shard_of(self, index: int) -> int:
        """The number of the shard that holds a row."""
        return bisect.bisect_right(self._starts, index) - 1

    @property
    def is_remote(self) -> bool:
        """True if shards are read through the node's cache."""
        return self._cache is not None

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Copy remote shards to this node ahead of their use; what cannot be read is told when it is used."""
        if self._cache is not None:
            with contextlib.suppress(DataError, OSError):
                for number in numbers:
                    self._file(number)

    def start_of(self, number: int) -> int:
        """The first row of a shard; of the one past the last, the number of rows."""
        return self._starts[number]

    def keep(self, numbers: Iterable[int]) -> None:
        """Unmap all shards but these."""
        self.release(set(self._mapped) - set(numbers))

    def release(self, numbers: Iterable[int]) -> None:
        """Unmap shards that are not read for now."""
        for number in numbers:
            self._mapped.pop(number, None)

    def drop(self, numbers: Iterable[int]) -> None:
        """Remove shards from the store for good; they are prepared again if they are asked for again."""
        numbers = list(numbers)
        self.release(numbers)
        for number in numbers:
            name = self._shard_name(number)
            # Without the record of its unit a shard is not missed but made anew.
            self._store.remove(record_of(name))
            self._store.remove(name)

    def _shard_name(self, number: int) -> str:
        return posixpath.normpath(f"{self._name}/{self.shards[number]['file']}")

    def _file(self, number: int) -> Path:
        """A shard's local path, its digest checked once."""
        name, digest = self._shard_name(number), self.shards[number]["digest"]
        if self._cache is not None:
            return self._cache.get(self._store, name, digest, self.shards[number]["size_bytes"])
        path = Path(self._store.folder(name))
        if name not in self._good:
            try:
                verify_tree(path.parent, {path.name: digest}, DataError)
            except DataError as error:
                # Without its record and the stamps of the data set the next preparation makes it anew.
                self._store.remove(record_of(name))
                self._store.remove(f"{self._name}/{STAMPS}")
                what = str(error).partition(";")[0]
                raise DataError(f"{what}; start again: the next preparation makes it anew") from None
            self._good.add(name)
        return path


def record_of(shard: str) -> str:
    """The name of what is remembered of the unit that a shard is of, from the shard's name or path."""
    folder, _, name = shard.rpartition("/")
    return f"{folder}/{name.partition('.')[0]}.json"


def counts_line(counts: dict[str, Any]) -> str:
    """What became of the rows of a data set, in words, from its manifest's counts."""
    filtered, quarantined = sum(counts["filtered"].values()), sum(counts["quarantined"].values())
    return (
        f"{counts['rows']:,} rows, {counts['documents']:,} used, {filtered:,} filtered, "
        f"{quarantined:,} quarantined; {counts['tokens']:,} tokens, {counts['targets']:,} of them targets"
    )


def read_manifest(folder: Folder) -> dict[str, Any]:
    """The manifest of a prepared data set. Raises `DataError` if there is none of this version."""
    parent, name = split_folder(folder)
    manifest = open_store(parent).read_json(f"{name}/{MANIFEST}")
    where = f"{str(folder).rstrip('/')}/{MANIFEST}"
    if manifest is None:
        raise DataError(
            f"{where}: missing or damaged; {folder} is not prepared data, make it with `ftray data prepare`"
        )
    return checked(manifest, where)


def checked(content: Any, where: str) -> dict[str, Any]:
    """A manifest or window of this version. Raises `DataError` for another one."""
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(f"{where}: format version {version} is not {FORMAT_VERSION}; prepare the data again")
    return dict(content)


def window_name(window_shards: int, number: int) -> str:
    """File name of a window of a data set that is still being made."""
    return f"window-{window_shards}-{number:06d}.json"

"""The rows of a step: from the global order to this rank's micro batches."""

import dataclasses
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ftray.config.recipe import DataConfig
from ftray.core.errors import DataError
from ftray.data.arrange import arrange, grown, spans_of
from ftray.data.batch import Batch, collate
from ftray.data.cache import NodeCache
from ftray.data.dataset import mark_used
from ftray.data.grow import GrowingShards
from ftray.data.order import Order, dp_slice
from ftray.data.read import Shards
from ftray.data.store import Folder
from ftray.data.transform.read_time import ReadTime
from ftray.strategy.base import Strategy


class Feed:
    """Training rows in the global order, and validation rows in theirs.

    Args:
        train: prepared shards.
        validation: prepared shards, or None.
        strategy: says which part of a global batch is this rank's.
        data: window size and mixture.
        global_batch_size: rows in one optimiser step.
        micro_batch_size: rows in one forward pass.
        seed: the run's seed.
    """

    def __init__(
        self,
        train: Folder,
        validation: Folder | None,
        strategy: Strategy,
        data: DataConfig,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
    ) -> None:
        cache = NodeCache(max_bytes=int(data.node_cache_gb * 2**30))
        self.shards: Shards = (
            GrowingShards(train, data.window_shards, cache=cache)
            if data.stream
            else Shards(train, verify=False, cache=cache)
        )
        self.validation = Shards(validation, verify=False, cache=cache) if validation else None
        self._data, self._dropped, self._counted = data, 0, 0
        self._uses: Counter[str] = Counter()
        self._windows: dict[int, int] = {}
        self._sources = spans_of(self._manifest(), data) if data.mixture else []
        self._ahead: threading.Thread | None = None
        self.order = self._arrange(global_batch_size, seed)
        self.strategy, self.micro_batch_size = strategy, micro_batch_size
        steps, pairs = data.read_transforms, bool(self.shards.manifest["pairs"])
        self._read = ReadTime(steps, seed, pairs=pairs)
        self._read_validation = ReadTime(steps, seed, pairs=pairs, validation=True)

    @property
    def digest(self) -> str:
        """Identity of the training data."""
        return self.shards.digest

    @property
    def counts(self) -> dict[str, Any]:
        """What became of the training rows when they were prepared."""
        return dict(self.shards.manifest["counts"])

    @property
    def manifests(self) -> list[dict[str, Any]]:
        """Of the training rows, and of the validation rows if there are any."""
        return [shards.manifest for shards in (self.shards, self.validation) if shards is not None]

    def mark_used(self, run_dir: Path) -> None:
        """Tell whoever clears the cache that a run needs its data sets."""
        for shards in (self.shards, self.validation):
            if shards is not None:
                mark_used(shards.path, run_dir)

    def go_on(self, step: int, position: int) -> None:
        """Begin step `step` at a position of the order, whatever batch sizes came before."""
        offset = position - step * self.order.global_batch_size
        self.order = dataclasses.replace(self.order, offset=offset)

    def rows(self, step: int) -> npt.NDArray[np.int64]:
        """This rank's row indices of a step; -1 fills up a batch that does not divide.

        Raises:
            DataError: if they were dropped, or what stopped the preparation they are waited for from.
        """
        end = self.order.position(step + 1)
        if isinstance(self.shards, GrowingShards) and self.shards.ensure(end):
            self.order = grown(self.order, self.shards.shards, self._data.window_shards)
        if self._data.drop_consumed and end > len(self.shards):
            raise DataError(
                f"data.drop_consumed: step {step + 1} needs rows a second time that are dropped after the first; "
                "set it to false, or train fewer steps"
            )
        return self.order.part(step, self.strategy.dp_rank, self.strategy.dp_size)

    def _move(self, rows: npt.NDArray[np.int64]) -> None:
        """Unmap windows that are left behind and fetch the next one ahead, where shards are remote."""
        if not self.shards.is_remote:
            return
        shards, size, ahead = self.shards, self._data.window_shards, list[int]()
        moved = False
        for start, stop in self._sources or [(0, len(shards.shards))]:
            mine = rows[(rows >= shards.start_of(start)) & (rows < shards.start_of(stop))]
            if len(mine):
                begin = start + (shards.shard_of(int(mine.max())) - start) // size * size
                if self._windows.get(start) != begin:
                    self._windows[start] = begin
                    ahead += range(min(begin + size, stop), min(begin + 2 * size, stop))
                    moved = True
        if not moved:
            return
        shards.keep(n for begin in self._windows.values() for n in range(begin, begin + size))
        if self._ahead is not None:
            self._ahead.join()
        self._ahead = threading.Thread(target=self.shards.prefetch, args=(ahead,), daemon=True)
        self._ahead.start()

    def drop_before(self, position: int) -> None:
        """Remove the shards of windows that end at a position or before, if the recipe says so (on rank 0)."""
        if not self._data.drop_consumed:
            return
        shards, size = self.shards.shards, self._data.window_shards
        self._uses.update(shard["file"] for shard in shards[self._counted :])
        self._counted = len(shards)
        while (end := self._dropped + size) <= len(shards) and self.shards.start_of(end) <= position:
            numbers = range(self._dropped, end)
            self._uses.subtract(shards[n]["file"] for n in numbers)
            # Equal units have the same shards, which may come again.
            self.shards.drop([n for n in numbers if not self._uses[shards[n]["file"]]])
            self._dropped = end

    def _arrange(self, global_batch_size: int, seed: int) -> Order:
        return arrange(self._manifest(), self._data, global_batch_size, seed)

    def _manifest(self) -> dict[str, Any]:
        return {**self.shards.manifest, "shards": self.shards.shards}

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro batches of a step."""
        rows = self.rows(step)
        self._move(rows)
        strategy, epochs = self.strategy, np.zeros_like(rows)
        if self._read:
            epochs = self.order.part_epochs(step, strategy.dp_rank, strategy.dp_size)
        return list(self._micro(self.shards, rows, epochs, self._read))

    def validation_batches(self) -> list[Batch]:
        """This rank's part of all validation rows."""
        if self.validation is None:
            return []
        indices = np.arange(len(self.validation), dtype=np.int64)
        rows = dp_slice(indices, self.strategy.dp_rank, self.strategy.dp_size)
        return list(self._micro(self.validation, rows, np.zeros_like(rows), self._read_validation))

    def _micro(
        self, shards: Shards, rows: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64], read: ReadTime
    ) -> Iterator[Batch]:
        for start in range(0, len(rows), self.micro_batch_size):
            part = slice(start, start + self.micro_batch_size)
            found = [shards.row(int(index)) for index in rows[part]]
            if read:
                places = zip(found, rows[part].tolist(), epochs[part].tolist(), strict=True)
                found = [read(row, index, epoch) for row, index, epoch in places]
            yield collate(found, rows[part]).to(self.strategy.device)

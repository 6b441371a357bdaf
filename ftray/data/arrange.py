"""From a data set's shards and a recipe's `data` section to the order of its rows."""

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ftray.config.recipe import DataConfig
from ftray.core.errors import DataError
from ftray.data.mixture import Mixture, Part
from ftray.data.order import Order


def arrange(manifest: dict[str, Any], data: DataConfig, global_batch_size: int, seed: int) -> Order:
    """The order of a data set's rows.

    Args:
        manifest: of the prepared data set.
        data: window size and mixture.
        global_batch_size: rows in one optimiser step.
        seed: the run's seed.

    Raises:
        DataError: if the mixture does not name every source of the data set once.
    """
    rows = [shard["rows"] for shard in manifest["shards"]]
    if not data.mixture:
        return Order(sum(rows), global_batch_size, seed, tuple(_sums(rows, data.window_shards)))
    patterns = [manifest["sources"][shard["source"]]["pattern"] for shard in manifest["shards"]]
    _check_names([entry.source for entry in data.mixture], data.train)
    parts = []
    for entry in data.mixture:
        numbers = [number for number, pattern in enumerate(patterns) if pattern == entry.source]
        if not numbers:
            raise DataError(f"data.mixture: {entry.source}: no row of it is left; drop it from the mixture")
        start = sum(rows[: numbers[0]])
        windows = _sums([rows[number] for number in numbers], data.window_shards)
        starts = [start + sum(windows[:i]) for i in range(len(windows))]
        ranges = tuple((begin, begin + length) for begin, length in zip(starts, windows, strict=True))
        parts.append(Part(entry.source, entry.weight, ranges, entry.max_epochs))
    return Mixture(sum(rows), global_batch_size, seed, parts=tuple(parts))


def grown(order: Order, shards: Sequence[dict[str, Any]], window_shards: int) -> Order:
    """The order of a data set that has become longer, without a look at the windows that stay as they are."""
    whole = max(0, len(order.windows) - 1)  # the last one may have been cut short
    rows = [shard["rows"] for shard in shards[whole * window_shards :]]
    windows = (*order.windows[:whole], *_sums(rows, window_shards))
    return dataclasses.replace(order, num_rows=sum(windows), windows=windows)


def spans_of(manifest: dict[str, Any], data: DataConfig) -> list[tuple[int, int]]:
    """Runs [start, stop) of shards with windows of their own: those of every source of a mixture, or all."""
    shards = manifest["shards"]
    if not data.mixture:
        return [(0, len(shards))]
    patterns = [manifest["sources"][shard["source"]]["pattern"] for shard in shards]
    starts = [n for n, pattern in enumerate(patterns) if n == 0 or pattern != patterns[n - 1]]
    return list(pairwise([*starts, len(shards)]))


def _sums(rows: Sequence[int], window_shards: int) -> list[int]:
    """Rows of each window of consecutive shards."""
    return [sum(rows[start : start + window_shards]) for start in range(0, len(rows), window_shards)]


def _check_names(named: Sequence[str], sources: Sequence[str]) -> None:
    if unknown := sorted(set(named) - set(sources)):
        known = ", ".join(sources)
        raise DataError(f"data.mixture: {unknown[0]!r} is no entry of data.train; name one of: {known}")
    missing = [source for source in sources if source not in named]
    if missing or len(named) != len(set(named)):
        odd = missing[0] if missing else next(name for name in named if named.count(name) > 1)
        raise DataError(
            f"data.mixture: {odd!r} must stand in it once; give every entry of data.train a weight"
        )

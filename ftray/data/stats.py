"""Numbers and a picture of a prepared data set."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from ftray.data.pairs import SIDES
from ftray.data.read import IGNORE_INDEX, Shards
from ftray.data.store import Folder


@dataclass(frozen=True)
class Stats:
    """What the shards of a data set hold."""

    lens: npt.NDArray[np.int64]
    """Tokens of every document, or piece of a long one."""
    duplicates: int
    """Documents whose tokens are those of an earlier one."""
    max_length: int
    """Tokens of a row of training."""
    targets_by_side: dict[str, npt.NDArray[np.int64]]
    """Target tokens of the chosen and of the rejected answers, if the rows are preference pairs."""
    sources: list[dict[str, Any]]
    """File and counts of each source."""


def measure(folder: Folder) -> Stats:
    """Read a prepared data set once. Raises `DataError` as `Shards`."""
    shards = Shards(folder)
    lens: list[npt.NDArray[np.int32]] = [np.zeros(0, np.int32)]
    targets: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)]
    seen: set[bytes] = set()
    total = 0
    for index in range(len(shards)):
        row = shards.row(index)
        lens.append(row.doc_lens)
        learnt = np.concatenate([[0], np.cumsum(row.labels != IGNORE_INDEX)])
        targets.append(np.diff(learnt[np.concatenate([[0], np.cumsum(row.doc_lens)])]))
        for document in np.split(row.input_ids, np.cumsum(row.doc_lens)[:-1]):
            seen.add(xxhash.xxh3_128_digest(document.tobytes()))
            total += 1
    manifest = shards.manifest
    sources = [
        {"file": source["file"], **counts}
        for source, counts in zip(manifest["sources"], manifest["source_counts"], strict=True)
    ]
    by_side = np.concatenate(targets).reshape(-1, len(SIDES)) if manifest["pairs"] else None
    return Stats(
        np.concatenate(lens).astype(np.int64),
        total - len(seen),
        int(manifest["max_length"]),
        {} if by_side is None else dict(zip(SIDES, by_side.T, strict=True)),
        sources,
    )


def plot_lengths(stats: Stats, path: Path) -> Path:
    """Draw the histogram of document lengths, by documents and by tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    # Lengths spread over orders of magnitude, so the bins grow with them.
    bins = np.geomspace(1, max(2, stats.lens.max(initial=2)), 40)
    for axis, weights, title in zip(
        figure.subplots(1, 2), (None, stats.lens), ("documents", "tokens"), strict=True
    ):
        axis.hist(stats.lens, bins=bins.tolist(), weights=weights)
        axis.axvline(stats.max_length, linestyle="--", linewidth=1, color="black")
        axis.set(title=f"{title} by length", xlabel="tokens of the document", xscale="log")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    return path

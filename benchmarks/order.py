"""What the data order costs at scale: 1,024 ranks over 10^9 rows, simulated in one process.

    python -m benchmarks.order --json

Every rank computes its own rows of every global batch. Times are CPU time of one rank; the order is checked where
it is most likely to be wrong: at the first batch, around ends of windows and of the epoch, and at random batches.
"""

import argparse
import json
import time
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from ftray.data.mixture import Mixture, Part, source_rows
from ftray.data.order import Order

ROWS, RANKS = 10**9, 1024
BATCH = 4 * RANKS
WINDOW = 1 << 16
"""Rows of a window: 256 shards of 256 rows."""


def build(rows: int, window: int, batch: int) -> dict[str, Order]:
    """The orders that are measured: one window, many windows, a mixture of eight sources."""
    cuts = np.append(np.arange(0, rows, window), rows)
    edges = np.linspace(0, rows, 9).astype(int)
    parts = [
        Part(str(i), float(i + 1), tuple((a, min(a + window, stop)) for a in range(start, stop, window)))
        for i, (start, stop) in enumerate(pairwise(edges))
    ]
    return {
        "one_window": Order(rows, batch, seed=1),
        "windows": Order(rows, batch, seed=1, windows=tuple(np.diff(cuts).tolist())),
        "mixture": Mixture(rows, batch, seed=1, parts=tuple(parts)),
    }


def check(order: Order, ranks: int, window: int | None) -> int:
    """Compare all ranks' parts with the global batch where it matters; returns how many batches were checked."""
    steps = order.num_rows // order.global_batch_size
    edges = [0, 1, steps - 1, steps, steps + 1]
    if window:
        edges += [
            window // order.global_batch_size * i for i in (1, 2, steps * order.global_batch_size // window)
        ]
    drawn = np.random.default_rng(0).integers(0, 3 * steps, 5).tolist()
    # A mixture has no windows of its own at the ends of these; a few batches of a thousand ranks are enough.
    checked = [0, steps, drawn[0]] if isinstance(order, Mixture) else [*edges, *drawn]
    for step in checked:
        whole = order.batch(step)
        joined = np.concatenate([order.part(step, rank, ranks) for rank in range(ranks)])
        assert np.array_equal(joined[joined >= 0], whole), f"step {step}"
        assert whole.min() >= 0 and whole.max() < order.num_rows
        crosses = step * order.global_batch_size % order.num_rows + order.global_batch_size > order.num_rows
        if not crosses and not isinstance(order, Mixture):
            assert len(np.unique(whole)) == len(whole), f"step {step}: a row twice"
    if isinstance(order, Mixture):
        check_mixture(order)
    elif window:
        check_windows(order, window)
    return len(checked)


def check_windows(order: Order, window: int) -> None:
    """The first windows, the last, and some drawn at random, in two epochs: each has its own rows, each once."""
    last = (order.num_rows - 1) // window
    numbers = {0, 1, last, *np.random.default_rng(1).integers(0, last + 1, 5).tolist()}
    for epoch in (0, 2):
        for number in numbers:
            begin, end = number * window, min((number + 1) * window, order.num_rows)
            rows = order.rows(epoch * order.num_rows + np.arange(begin, end))
            assert np.array_equal(np.sort(rows), np.arange(begin, end)), f"window {number} of epoch {epoch}"


def check_mixture(order: Mixture) -> None:
    """Shares at the begin and far on; and of windows of every source, that each row comes once in a pass."""
    weights = np.array([part.weight for part in order.parts])
    bounds = np.array([part.row_ids[0][0] for part in order.parts] + [order.num_rows])
    for start in (0, order.num_rows, 7 * order.num_rows + 12_345):
        positions = start + np.arange(60_000)
        rows = order.rows(positions)
        found = np.histogram(rows, bounds)[0] / len(rows)
        assert np.abs(found / (weights / weights.sum()) - 1).max() < 0.01, f"shares at {start}: {found}"
        sources, places = order.draw(positions)
        assert np.array_equal(np.searchsorted(bounds, rows, side="right") - 1, sources), f"sources at {start}"
        for number, part in enumerate(order.parts):
            mine = places[sources == number]
            assert (np.diff(mine) == 1).all(), f"{part.name}: a place left out or taken twice at {start}"
    for number, part in enumerate(order.parts):
        begin, end = part.row_ids[-1]
        for first in (0, begin - part.row_ids[0][0]):
            size = part.row_ids[0][1] - part.row_ids[0][0] if first == 0 else end - begin
            rows = source_rows(part, part.num_rows + first + np.arange(size), order.seed, number)
            expected = np.arange(size) + part.row_ids[0][0] + first
            assert np.array_equal(np.sort(rows), expected), f"{part.name}: the window at {first}"


def cpu_us(work: Callable[[int], Any], repeats: int) -> float:
    """Median CPU microseconds of a call."""
    times = []
    for step in range(repeats):
        start = time.process_time_ns()
        work(step * 1009)
        times.append(time.process_time_ns() - start)
    return float(np.median(times)) / 1000


def measure(order: Order, ranks: int, repeats: int) -> dict[str, float]:
    """CPU time of a rank's part and of the whole batch, and memory of the order and of a call."""
    tracemalloc.start()
    order.part(7, ranks - 1, ranks)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "rank_us_per_batch": round(cpu_us(lambda step: order.part(step, step % ranks, ranks), repeats), 1),
        "global_us_per_batch": round(cpu_us(order.batch, repeats), 1),
        "call_peak_kib": round(peak_bytes / 1024, 1),
    }


def main() -> None:
    """Print a line for each order and a summary last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the summary only")
    parser.add_argument("--repeats", type=int, default=200)
    arguments = parser.parse_args()
    summary: dict[str, Any] = {"benchmark": "order", "rows": ROWS, "ranks": RANKS, "global_batch_size": BATCH}
    tracemalloc.start()
    orders = build(ROWS, WINDOW, BATCH)
    summary["orders_kib"] = round(tracemalloc.get_traced_memory()[0] / 1024)
    tracemalloc.stop()
    for name, order in orders.items():
        result: dict[str, Any] = measure(order, RANKS, arguments.repeats)
        result["batches_checked"] = check(order, RANKS, None if name == "one_window" else WINDOW)
        summary[name] = result
        if not arguments.json:
            print(name, json.dumps(result), flush=True)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()

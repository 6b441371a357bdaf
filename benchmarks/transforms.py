"""Transforms on real text: MB per CPU-second of each, and how many planted near duplicates are found.

python -m benchmarks.transforms --json     # 20 MB, about a minute on one core
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.corpus import texts
from ftray.core.spec import build_piece
from ftray.data.rows import Row, Span, to_table
from ftray.data.transform.base import Barrier
from ftray.data.transform.minhash import _shingles, _words, clusters, signatures
from ftray.data.transform.near_dedup import NearDedup

STEPS: list[Any] = [
    "clean",
    "length",
    "quality",
    "pii",
    {"type": "language", "keep": ["en"]},
    "dedup",
    "near_dedup",
    "split",
]
ROWS_PER_UNIT = 1000
ALIKE = 0.8


def as_table(documents: list[str]) -> pa.Table:
    """Documents as rows of `text`."""
    return to_table((i, i, Row("text", (Span("text", text, True),))) for i, text in enumerate(documents))


def rate(step: Any, documents: list[str]) -> dict[str, float]:
    """MB per CPU-second of one transform; of a barrier, its keys, and the seconds of its decision apart."""
    transform = build_piece("transform", step)
    units = [as_table(documents[i : i + ROWS_PER_UNIT]) for i in range(0, len(documents), ROWS_PER_UNIT)]
    work: Callable[[pa.Table], Any] = transform.keys if isinstance(transform, Barrier) else transform
    work(units[0].slice(0, 2).combine_chunks())  # what is loaded once is not counted
    start = time.process_time()
    results = [work(unit) for unit in units]
    taken = time.process_time() - start
    found = {"mb_per_cpu_s": sum(len(text.encode()) for text in documents) / 1e6 / taken}
    if isinstance(transform, Barrier):
        start = time.process_time()
        transform.keep(results)
        found["decision_s_per_million_rows"] = (time.process_time() - start) / len(documents) * 1e6
    return found


def edited(text: str, rng: random.Random, share: float) -> str:
    """A text with some of its words replaced."""
    words = text.split(" ")
    for place in rng.sample(range(len(words)), max(1, int(share * len(words)))):
        words[place] = f"x{rng.randrange(10**9)}"
    return " ".join(words)


def jaccard(left: str, right: str) -> float:
    """The true similarity that signatures estimate: hashes of the same n-grams, all compared."""
    one, two = (
        set(_shingles(*_words(as_table([text])), NearDedup().ngram)[0].tolist()) for text in (left, right)
    )
    return len(one & two) / len(one | two)


def recall(documents: list[str], num_pairs: int) -> dict[str, Any]:
    """Share of planted pairs found, by their true similarity, among all other documents."""
    rng = random.Random(0)
    base = documents[:num_pairs]
    planted = [edited(text, rng, 0.06 * rng.random()) for text in base]
    true = np.array([jaccard(a, b) for a, b in zip(base, planted, strict=True)])
    step = NearDedup()
    root = clusters(signatures(as_table(documents + planted), step.ngram), step.threshold)
    found = root[:num_pairs] == root[len(documents) :]
    bins = {}
    for low, high in (
        (0.4, 0.5),
        (0.5, 0.6),
        (0.6, 0.65),
        (0.65, 0.7),
        (0.7, 0.75),
        (0.75, 0.8),
        (0.8, 0.85),
        (0.85, 0.9),
        (0.9, 1.01),
    ):
        inside = (true >= low) & (true < high)
        bins[f"{low}-{min(high, 1)}"] = {"pairs": int(inside.sum()), "found": int(found[inside].sum())}
    above = true >= ALIKE
    return {"recall_from_0.8": float(found[above].mean()), "by_true_jaccard": bins}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=float, default=20)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--json", action="store_true", help="one JSON line last")
    arguments = parser.parse_args()
    documents, total = [], 0
    for text in texts():
        documents.append(text)
        total += len(text.encode())
        if total > arguments.mb * 1e6:
            break
    result: dict[str, Any] = {"rows": len(documents), "mb": total / 1e6}
    for step in STEPS:
        name = step if isinstance(step, str) else step["type"]
        result[name] = rate(step, documents)
        print(f"{name:12}", {key: round(value, 2) for key, value in result[name].items()})
    result["near_duplicates"] = recall(documents, min(arguments.pairs, len(documents)))
    print("near duplicates", result["near_duplicates"])
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()

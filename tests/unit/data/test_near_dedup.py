"""Near deduplication and leak-proof splits, against true Jaccard similarities of all pairs."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ftray.config.recipe import DataConfig
from ftray.core.errors import ConfigError
from ftray.core.spec import parse
from ftray.data.prepare import prepare_local
from ftray.data.read import Shards
from ftray.data.rows import Row, Span, to_table
from ftray.data.transform.minhash import NUM_PERM, clusters, rows_per_band, signatures
from ftray.data.transform.near_dedup import NearDedup
from ftray.data.transform.split import Split


def table(texts: list[str]) -> pa.Table:
    return to_table((i, i, Row("text", (Span("text", text, True),))) for i, text in enumerate(texts))


def corpus(num: int, rng: random.Random, words: int = 80) -> list[str]:
    vocabulary = [f"w{i}" for i in range(3000)]
    return [" ".join(rng.choices(vocabulary, k=words)) for _ in range(num)]


def edited(text: str, rng: random.Random, edits: int) -> str:
    words = text.split()
    for place in rng.sample(range(len(words)), edits):
        words[place] = f"x{rng.randrange(10**6)}"
    return " ".join(words)


def jaccard(a: str, b: str, n: int = 5) -> float:
    def grams(text: str) -> set[tuple[str, ...]]:
        words = text.lower().split()
        return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}

    return len(grams(a) & grams(b)) / len(grams(a) | grams(b))


def test_estimates_are_near_the_truth() -> None:
    rng = random.Random(1)
    base = corpus(150, rng)
    others = [edited(text, rng, 1 + i % 6) for i, text in enumerate(base)]
    found = signatures(table(base + others), 5)
    assert found.shape == (300, NUM_PERM)
    estimated = (found[:150] == found[150:]).mean(axis=1)
    true = np.array([jaccard(a, b) for a, b in zip(base, others, strict=True)])
    assert np.abs(estimated - true).mean() < 0.05
    assert np.abs(estimated - true).max() < 0.2


def test_planted_pairs_are_found_and_nothing_else() -> None:
    rng = random.Random(2)
    base = corpus(1000, rng)
    planted = [edited(text, rng, 1) for text in base[:300]]
    true = np.array([jaccard(a, b) for a, b in zip(base, planted, strict=False)])
    assert true.min() > 0.85
    masks = NearDedup().keep([NearDedup().keys(table(base)), NearDedup().keys(table(planted))])
    assert masks[0].all()
    recall = 1 - masks[1].mean()
    assert recall >= 0.99, recall
    apart = NearDedup(threshold=0.8).keep(
        [NearDedup().keys(table([edited(t, rng, 12) for t in base + base]))]
    )
    assert apart[0].all()  # 12 of 80 words changed: at most 0.35 alike


@pytest.mark.parametrize(
    "texts",
    [
        ["one two three", "One, two: three!", "one two four"],
        ["今日は天気がいいですね", "今日は天気がいいですね。", "昨日は雨が降っていましたね"],
        ["!!!", "!!!", "???"],
        ["", "", "a"],
    ],
    ids=["case and punctuation", "without spaces", "without words", "empty"],
)
def test_short_rows(texts: list[str]) -> None:
    [mask] = NearDedup().keep([NearDedup().keys(table(texts))])
    assert mask.tolist() == [True, False, True]


def test_clusters_reach_through_others() -> None:
    rng = random.Random(3)
    chain = corpus(1, rng)
    for _ in range(20):
        chain.append(edited(chain[-1], rng, 1))
    assert jaccard(chain[0], chain[-1]) < 0.5
    assert set(clusters(signatures(table(chain), 5), 0.8)) == {0}


def test_bands_miss_few_pairs_at_the_threshold() -> None:
    for threshold in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        width = rows_per_band(threshold)
        assert (1 - threshold**width) ** (NUM_PERM // width) <= 0.01
    assert NearDedup().keep([[], []])[1].shape == (0,)


def parts(texts: list[str], split: dict[str, Any]) -> list[str]:
    """The part of each row; every row is in exactly one."""
    names = ("train", "validation", "test")
    masks = {
        name: np.concatenate(Split(part=name, **split).keep([Split().keys(table(texts))])) for name in names
    }
    assert (sum(masks.values()) == 1).all()
    return [next(name for name in names if masks[name][i]) for i in range(len(texts))]


def test_no_near_duplicate_pair_crosses_parts() -> None:
    rng = random.Random(4)
    base = corpus(150, rng, words=40)
    texts = base + [edited(text, rng, 1 + i % 2) for i, text in enumerate(base)] + base[:20]
    rng.shuffle(texts)
    split = {"validation": 0.25, "test": 0.25}
    found = parts(texts, split)
    pairs = [
        (i, j) for i, j in itertools.combinations(range(len(texts)), 2) if jaccard(texts[i], texts[j]) > 0.7
    ]
    assert len(pairs) > 100
    assert all(found[i] == found[j] for i, j in pairs)
    assert 0.1 < found.count("validation") / len(found) < 0.4 and "test" in found
    # The part of a row follows neither from its place nor from rows unlike it.
    shuffled = list(texts)
    rng.shuffle(shuffled)
    again = dict(zip(shuffled, parts(shuffled + corpus(50, rng), split), strict=False))
    assert [again[text] for text in texts] == found
    assert parts(texts, {**split, "seed": 1}) != found


def test_validation_is_drawn_from_the_training_files(
    write_rows: Callable[..., Path], config: Callable[..., DataConfig], tokenizer_folder: str
) -> None:
    source = write_rows([{"text": text} for text in corpus(60, random.Random(5), words=9)])
    split = {"type": "split", "validation": 0.3, "test": 0.1}
    data = config(source, max_length=512, transforms=["clean", split])
    counts = [
        Shards(prepare_local(data, tokenizer_folder, s)).manifest["counts"] for s in ("train", "validation")
    ]
    trained, validated = (count["documents"] for count in counts)
    assert trained > validated > 0 and trained + validated < 60
    assert all(count["documents"] + count["filtered"]["split.other_part"] == 60 for count in counts)
    # Files given for validation stay whole.
    own = config(
        source,
        max_length=512,
        transforms=["clean", split],
        validation=str(write_rows([{"text": "a"}], "v.jsonl")),
    )
    assert Shards(prepare_local(own, tokenizer_folder, "validation")).manifest["counts"]["documents"] == 1
    with pytest.raises(ConfigError, match="leave nothing"):
        parse(Split, {"validation": 0.5, "test": 0.5})

"""Mixtures: shares within a row or so over any stretch, caps, and a pure function of (seed, position)."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftray.config.recipe import DataConfig
from ftray.core.errors import DataError
from ftray.core.spec import parse
from ftray.data.arrange import arrange
from ftray.data.mixture import Mixture, Part
from ftray.data.prepare import prepare_local
from ftray.data.read import Shards

Make = Callable[..., DataConfig]
Spec = list[tuple[int, float, float | None]]


def mixture(spec: Spec, batch: int = 8, seed: int = 0, windows: int = 1) -> Mixture:
    """A mixture of sources of (rows, weight, max_epochs), one after the other in the data set."""
    parts, start = [], 0
    for number, (rows, weight, cap) in enumerate(spec):
        cuts = [start + rows * i // windows for i in range(windows + 1)]
        ranges = tuple((a, b) for a, b in pairwise(cuts) if b > a)
        parts.append(Part(f"s{number}", weight, ranges, cap))
        start += rows
    return Mixture(start, batch, seed, parts=tuple(parts))


def sources_of(order: Mixture, positions: int) -> np.ndarray:
    return order.draw(np.arange(positions))[0]


@given(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0.05, 10), st.none()), min_size=1, max_size=6),
    st.integers(0, 10**12),
)
@settings(max_examples=60, deadline=None)
def test_every_stretch_has_its_shares(spec: Spec, start: int) -> None:
    order = mixture(spec)
    weights = np.array([weight for _, weight, _ in spec])
    drawn = order.draw(np.arange(start, start + 5000))
    counts = np.bincount(drawn[0], minlength=len(spec))
    assert np.abs(counts - 5000 * weights / weights.sum()).max() <= len(spec) + 1
    for number in range(len(spec)):
        places = drawn[1][drawn[0] == number]
        assert np.array_equal(
            places, np.arange(places[0], places[0] + len(places)) if len(places) else places
        )


def test_the_realised_ratio_is_within_one_percent() -> None:
    order = mixture([(1000, 0.7, None), (5000, 0.25, None), (100, 0.05, None)])
    for positions in (4_000, 20_000, 200_000):
        share = np.bincount(sources_of(order, positions)) / positions
        assert np.abs(share / [0.7, 0.25, 0.05] - 1).max() < 0.01


def test_each_source_is_drawn_epoch_by_epoch() -> None:
    order = mixture([(30, 3, None), (50, 1, None)], windows=4)
    rows = order.rows(np.arange(800))
    first, second = rows[rows < 30], rows[rows >= 30]
    for epoch in range(len(first) // 30):
        assert np.array_equal(np.sort(first[epoch * 30 : (epoch + 1) * 30]), np.arange(30))
    for epoch in range(len(second) // 50):
        assert np.array_equal(np.sort(second[epoch * 50 : (epoch + 1) * 50]), np.arange(30, 80))


@given(st.integers(0, 500), st.integers(1, 20), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_a_batch_does_not_depend_on_those_before(k: int, batch: int, seed: int) -> None:
    spec: Spec = [(37, 2, None), (11, 1, 40), (90, 5, None)]
    whole = mixture(spec, batch, seed).rows(np.arange((k + 1) * batch))
    assert np.array_equal(mixture(spec, batch, seed).batch(k), whole[k * batch :])


def test_another_seed_draws_other_rows() -> None:
    spec: Spec = [(300, 1, None), (300, 1, None)]
    one, two = mixture(spec, seed=1).rows(np.arange(200)), mixture(spec, seed=2).rows(np.arange(200))
    assert (one == two).sum() < 10
    halves = one[one < 300], one[one >= 300] - 300
    assert (halves[0][:90] == halves[1][:90]).sum() < 10, "sources of a size are not shuffled alike"


def test_a_cap_gives_the_share_to_the_others() -> None:
    order = mixture([(100, 0.5, 2.0), (100, 0.3, None), (100, 0.2, 1.0)])
    sources = sources_of(order, 3000)
    counts = np.bincount(sources)
    assert counts[0] == 200 and counts[2] == 100 and counts[1] == 2700
    assert set(sources[-2000:]) == {1}
    both = sources[:390]
    assert abs((both == 0).mean() - 0.5) < 0.01
    rows = order.rows(np.arange(3000))
    assert np.array_equal(np.bincount(rows[rows < 100], minlength=100), np.full(100, 2))


def test_a_weight_next_to_nothing_is_refused() -> None:
    """Its share would be none at all, and no position the one at which its cap is reached."""
    with pytest.raises(DataError, match="s1: weight 1e-10 is less than a millionth of all"):
        mixture([(10, 1, None), (20, 1e-10, 1.0), (5, 1, None)])


def test_all_capped() -> None:
    order = mixture([(10, 1, 1.0), (20, 1, 1.0)])
    assert np.array_equal(np.sort(order.rows(np.arange(30))), np.arange(30))
    with pytest.raises(
        DataError, match=r"every source has reached its `max_epochs` after 30 rows \(s0, s1\)"
    ):
        order.batch(4)


def test_from_a_recipe(tmp_path: Path, config: Make, tokenizer_folder: str) -> None:
    names = {"a.jsonl": 40, "b.jsonl": 15}
    for name, count in names.items():
        rows = [json.dumps({"text": f"{name[0]}{i}"}) for i in range(count)]
        (tmp_path / name).write_text("\n".join(rows))
    paths = [str(tmp_path / name) for name in names]
    fields: dict[str, Any] = {"train": paths, "packing": False, "cache_dir": str(tmp_path / "cache")}
    data = parse(DataConfig, {**fields, "mixture": {paths[1]: 3, paths[0]: 1}})
    shards = Shards(prepare_local(data, tokenizer_folder))
    rows = arrange(shards.manifest, data, 8, 0).rows(np.arange(400))
    letters = [chr(shards.row(int(row)).input_ids[0] - shards.row(0).input_ids[0] + ord("a")) for row in rows]
    assert abs(letters.count("b") - 300) <= 2 and letters.count("a") + letters.count("b") == 400
    for wrong, message in [({"x": 1}, "'x' is no entry"), ({paths[0]: 1}, "must stand in it once")]:
        with pytest.raises(DataError, match=message):
            arrange(shards.manifest, parse(DataConfig, {**fields, "mixture": wrong}), 8, 0)

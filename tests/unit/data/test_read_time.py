"""Transforms of rows when they are read: what they change, and that nothing but (seed, epoch, row) decides it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftray.config.recipe import DataConfig
from ftray.core.errors import ConfigError, DataError
from ftray.core.spec import parse
from ftray.data.prepare import Preparation
from ftray.data.read import IGNORE_INDEX, RowArrays, padding_row
from ftray.data.transform.goldfish import Goldfish
from ftray.data.transform.prompt_weight import PromptWeight
from ftray.data.transform.read_time import ReadTime

WriteRows = Callable[..., Path]


def row(lens: list[int], context: int = 3, seed: int = 0) -> RowArrays:
    """Documents of which all tokens but the first few are learnt."""
    ids = np.random.default_rng(seed).integers(0, 50_000, sum(lens)).astype(np.int32)
    place = np.concatenate([np.arange(n) for n in lens])
    labels = np.where(place >= context, ids, np.int32(IGNORE_INDEX)).astype(np.int32)
    weights = (labels != IGNORE_INDEX).astype(np.float32)
    for array in (ids, labels, weights):
        array.flags.writeable = False
    return RowArrays(ids, labels, weights, np.array(lens, np.int32), np.ones(len(lens), np.int32))


def apply(transform: Any, index: int = 0, epoch: int = 0, seed: int = 0, **fields: Any) -> RowArrays:
    return ReadTime([transform], seed, pairs=False, **fields)(row([300, 200]), index, epoch)


@pytest.mark.parametrize("choose", ["hash", "random"])
def test_goldfish_leaves_one_in_k_out(choose: Any) -> None:
    before = row([40_000])
    after = Goldfish(k=4, choose=choose).read(before, np.random.default_rng(0))
    learnt = (after.labels != IGNORE_INDEX).sum() / (before.labels != IGNORE_INDEX).sum()
    assert 0.74 < learnt < 0.76
    kept = after.labels != IGNORE_INDEX
    assert np.array_equal(after.labels[kept], before.labels[kept])
    assert (after.weights[~kept] == 0).all() and (after.weights[kept] == 1).all()
    assert after.labels.dtype == np.int32 and after.weights.dtype == np.float32


def test_a_repeated_passage_loses_the_same_tokens() -> None:
    """Wherever it stands: in another document, at another place, behind another document."""
    passage = row([400]).input_ids
    before, other = row([77], seed=1).input_ids, row([31], seed=2).input_ids

    def dropped(parts: list[np.ndarray], lens: list[int], start: int) -> np.ndarray:
        ids = np.concatenate(parts)
        whole = RowArrays(
            ids,
            ids.copy(),
            np.ones(len(ids), np.float32),
            np.array(lens, np.int32),
            np.ones(len(lens), np.int32),
        )
        labels = Goldfish(k=3).read(whole, np.random.default_rng(0)).labels
        return (labels == IGNORE_INDEX)[start + 13 : start + 400]

    alone = dropped([passage], [400], 0)
    assert 0.2 < alone.mean() < 0.45
    assert np.array_equal(alone, dropped([before, passage], [77, 400], 77))
    assert np.array_equal(alone, dropped([other, before, passage], [31, 477], 108))


def test_the_beginning_of_a_document_stays_and_knows_no_other() -> None:
    two = row([50, 60], context=1)
    labels = Goldfish(k=2).read(two, np.random.default_rng(0)).labels
    for begin in (0, 50):
        assert (labels[begin + 1 : begin + 13] != IGNORE_INDEX).all()
    assert np.array_equal(Goldfish(k=2).read(row([5]), np.random.default_rng(0)).labels, row([5]).labels), (
        "shorter than the context"
    )


def test_a_prompt_can_be_learnt_with_a_weight() -> None:
    found = PromptWeight(weight=0.25).read(row([5, 4]), np.random.default_rng(0))
    assert found.weights.tolist() == [0, 0.25, 0.25, 1, 1, 0, 0.25, 0.25, 1]
    assert (found.labels == IGNORE_INDEX).tolist() == [True, *[False] * 4, True, *[False] * 3]


def test_a_draw_depends_on_seed_epoch_and_row_alone() -> None:
    transform = Goldfish(choose="random")
    first = apply(transform).labels
    assert np.array_equal(first, apply(transform).labels)
    others = [apply(transform, index=1), apply(transform, epoch=1), apply(transform, seed=1)]
    assert not any(np.array_equal(first, other.labels) for other in others)
    twice = ReadTime([transform, transform], 0, pairs=False)(row([300, 200]), 0, 0).labels
    assert (twice == IGNORE_INDEX).sum() > (first == IGNORE_INDEX).sum() + 40, "two draws, not one"
    assert ReadTime([transform], 0, pairs=False)(padding_row(), -1, 0) is padding_row()
    assert np.array_equal(apply(transform, validation=True).labels, row([300, 200]).labels)


def test_pairs_are_refused_by_name() -> None:
    with pytest.raises(DataError, match="`goldfish` is not for preference pairs"):
        ReadTime([Goldfish()], 0, pairs=True)


def test_they_stand_behind_those_of_preparation() -> None:
    with pytest.raises(ConfigError, match="`goldfish` is applied when prepared rows are read; put it behind"):
        parse(DataConfig, {"train": "x", "transforms": ["goldfish", "dedup"]})
    data = parse(DataConfig, {"train": "x", "transforms": ["clean", "goldfish"], "stream": True})
    assert [type(item).__name__ for item in data.prepare_transforms] == ["Clean"]
    assert data.read_transforms == [Goldfish()]


def test_they_prepare_nothing_anew(tmp_path: Path, write_rows: WriteRows, tokenizer_folder: str) -> None:
    tree = {"train": str(write_rows([{"text": "hello"}])), "cache_dir": str(tmp_path / "cache")}
    plain, other = (
        Preparation(parse(DataConfig, {**tree, "transforms": steps}), tokenizer_folder).folder
        for steps in (["clean"], ["clean", {"type": "goldfish", "k": 3}])
    )
    assert plain == other

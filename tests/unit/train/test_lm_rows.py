"""`lm` learns every token, `sft` the answers."""

from pathlib import Path

import pytest
import torch

from ftray.config.recipe import Recipe
from ftray.core.errors import DataError
from ftray.data.batch import Batch
from ftray.train.io import LocalIO
from ftray.train.worker import begin
from tests.recipes import MakeRecipe


def batches(recipe: Recipe) -> list[Batch]:
    """Of the first step and of validation."""
    run = begin(recipe, LocalIO(Path(recipe.output_dir) / recipe.name), None)
    found = [*run.feed.batches(0), *run.feed.validation_batches()]
    run.checkpoints.close()
    run.io.close()
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_every_token_of_prompts_and_answers(make_recipe: MakeRecipe, packing: bool) -> None:
    settings = {"data__packing": packing}
    answers = batches(make_recipe("sft", objective="sft", **settings))
    everything = batches(make_recipe("lm", objective="lm", **settings))
    for some, all_ in zip(answers, everything, strict=True):
        assert torch.equal(some.input_ids, all_.input_ids)
        firsts = all_.cu_seq_lens[:-1].long()
        learnt = all_.labels[0] != -100
        learnt[firsts] = True
        assert learnt.all(), "a token is no target"
        assert torch.equal(all_.labels[0][all_.labels[0] != -100], all_.input_ids[0][all_.labels[0] != -100])
        assert (all_.weights[0][all_.labels[0] != -100] == 1).all()
        assert all_.num_targets > 2 * some.num_targets


def test_targets_are_left_out_of_all_of_them(make_recipe: MakeRecipe) -> None:
    steps = ["clean", "length", {"type": "goldfish", "k": 2, "choose": "random"}]
    found = batches(make_recipe(objective="lm", data__transforms=steps))[0]
    assert 0.3 < found.num_targets / found.input_ids.numel() < 0.7


def test_text_is_learnt_as_before(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text("alpha bravo charlie\n" * 50)
    files = {"data__train": str(tmp_path / "prose.txt"), "data__validation": [], "data__sample_by": "line"}
    for one, two in zip(
        batches(make_recipe("sft", objective="sft", **files)),
        batches(make_recipe("lm", objective="lm", **files)),
        strict=True,
    ):
        assert torch.equal(one.labels, two.labels) and torch.equal(one.weights, two.weights)


def test_pairs_are_refused_by_the_objective(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    row = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    (tmp_path / "pairs.jsonl").write_text(row * 8)
    recipe = make_recipe(objective="lm", data__train=str(tmp_path / "pairs.jsonl"), data__validation=[])
    with pytest.raises(DataError, match="objective: `lm`"):
        batches(recipe)

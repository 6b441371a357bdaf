"""Runs over one base in memory: each is its run alone, whoever else is there."""

import contextlib
import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftray.config.recipe import Recipe
from ftray.core.errors import CheckpointError, ConfigError, DataError, FtrayError, RunStopped, TrainError
from ftray.core.fs import read_json
from ftray.testing.tiny import tiny_base as make_base
from ftray.train.checkpoint import Checkpoints
from ftray.train.io import STOPPED, LocalIO
from ftray.train.population import Part, Population
from ftray.train.ray_group import advanced, read_error, write_error
from ftray.train.ray_work import FAILED, train_members
from ftray.train.run import Result
from ftray.train.worker import train
from tests.recipes import MakeRecipe

MEMBERS: list[dict[str, Any]] = [
    {"adapt__r": 4, "optim__learning_rate": 1e-2},
    {"adapt__r": 8, "optim__learning_rate": 3e-3, "adapt__lora_dropout": 0.2, "seed": 1},
    {"adapt__r": 2, "optim__weight_decay": 0.3, "train__max_grad_norm": 0.1, "lr_scheduler": "cosine"},
    {"train__global_batch_size": 3, "adapt__use_rslora": True, "seed": 2},
    {"data__max_length": 64, "train__ema_decay": 0.5, "optim__adam_beta2": 0.9},
    {"optim": {"type": "torch", "optimizer": "SGD", "learning_rate": 0.1, "settings": {"momentum": 0.9}}},
    {"objective": "sft", "adapt__lora_alpha": 8.0, "train__global_batch_size": 2},
    {"lr_scheduler": {"type": "linear", "warmup_steps": 2}, "seed": 3, "adapt__lora_dropout": 0.1},
]


def recipes(make: MakeRecipe, count: int, prefix: str, **changes: Any) -> list[Recipe]:
    return [make(f"{prefix}{n}", **MEMBERS[n % len(MEMBERS)] | changes) for n in range(count)]


def parts_of(made: list[Recipe], folder: Path, **settings: Any) -> list[Part]:
    return [Part(recipe, LocalIO(folder / recipe.name), **settings) for recipe in made]


def sound(found: list[Result | FtrayError]) -> list[Result]:
    assert all(isinstance(result, Result) for result in found), found
    return found  # type: ignore[return-value]


def delta_of(result: Result) -> dict[str, torch.Tensor]:
    assert result.delta is not None
    return load_file(result.delta / "adapter_model.safetensors")


def largest_difference(one: Result, other: Result) -> float:
    ours, theirs = delta_of(one), delta_of(other)
    assert ours.keys() == theirs.keys()
    return max(float((tensor - theirs[name]).abs().max()) for name, tensor in ours.items())


def losses(result: Result) -> list[float]:
    return losses_in(result.run_dir)


def losses_in(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if not record.get("final")]


def test_each_member_is_its_run_alone(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """With others of other ranks, rates, clips, schedules, batches, lengths, seeds and optimisers, however many.

    To rounding; bit for bit where each micro batch has a pass to itself.
    """
    made = recipes(make_recipe, 8, "m")
    alone = [train(recipe, LocalIO(tmp_path / "alone" / recipe.name), stop_at=3) for recipe in made]
    population = Population(made[0])
    for count, rows in itertools.product((2, 4, 8), (None, 2)):
        parts = parts_of(made[:count], tmp_path / f"{count}-{rows}", stop_at=3)
        found = sound(population.train(parts, rows_per_pass=rows))
        for result, other in zip(found, alone, strict=False):
            assert losses(result) == pytest.approx(losses(other), rel=1e-5)
            assert result.metrics == pytest.approx(other.metrics, rel=1e-5)
            assert (result.step, result.tokens, result.rows) == (other.step, other.tokens, other.rows)
            assert largest_difference(result, other) <= (1e-5 if rows is None else 0)


def test_whoever_goes_on_from_a_donor_in_memory_is_as_from_its_checkpoint(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, moments, data position and dropout of the donor, with another rate; also for one that took over.

    No file is read for it, and no donor is held once everybody has begun.
    """
    made = recipes(make_recipe, 3, "m", optim__learning_rate=1e-2)
    population = Population(made[0])
    first = sound(population.train(parts_of(made, tmp_path / "first", stop_at=3)))
    heirs = [
        make_recipe("own", **MEMBERS[0] | {"optim__learning_rate": 1e-2}),
        make_recipe("taken", **MEMBERS[1] | {"optim__learning_rate": 2e-2}),
        make_recipe("also", **MEMBERS[1] | {"optim__learning_rate": 5e-3}),
    ]
    donors = [first[0].checkpoint, first[1].checkpoint, first[1].checkpoint]

    def second(owner: Population, folder: Path) -> list[Result]:
        pairs = zip(heirs, donors, strict=True)
        return sound(owner.train([Part(recipe, LocalIO(folder / recipe.name), c) for recipe, c in pairs]))

    held = []
    population._model.base_model.register_forward_pre_hook(lambda *_: held.append(len(population._residents)))
    with monkeypatch.context() as without_files:
        without_files.delattr(Checkpoints, "restore")
        in_memory = second(population, tmp_path / "memory")
        with pytest.raises(AttributeError, match="restore"):
            second(Population(made[0]), tmp_path / "none")
    assert held and set(held) == {0}
    assert set(population._residents) == {result.checkpoint for result in in_memory}
    from_files = second(Population(made[0]), tmp_path / "files")
    for recipe, donor, one, other in zip(heirs, donors, in_memory, from_files, strict=True):
        alone = train(recipe, LocalIO(tmp_path / "alone" / recipe.name), start_from=donor)
        assert largest_difference(one, other) == 0
        assert largest_difference(one, alone) < 1e-5
        assert (one.step, one.tokens) == (alone.step, alone.tokens) == (6, other.tokens)
    assert largest_difference(in_memory[1], in_memory[2]) > 1e-4


def test_room_in_a_pass_is_taken_by_those_there_are(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """A pass has no more rows than told, whoever's they are; a member's micro batches and dropout stay."""
    made = recipes(make_recipe, 2, "m", train__per_device_train_batch_size=1)
    population, seen = Population(made[0]), []
    trunk = population._model.base_model
    trunk.register_forward_pre_hook(
        lambda m, a, kwargs: seen.append(torch.is_grad_enabled()), with_kwargs=True
    )
    alone = train(made[1], LocalIO(tmp_path / "alone"), stop_at=3)
    passes = {}
    for number, (who, rows) in enumerate([(made, None), (made, 1), (made, 4), (made[1:], 4)]):
        seen.clear()
        # The first ends after a step; the second has the room from then on.
        parts = [
            Part(r, LocalIO(tmp_path / f"{number}{r.name}"), stop_at=3 if r is made[1] else 1) for r in who
        ]
        result = sound(population.train(parts, rows_per_pass=rows))[-1]
        assert largest_difference(result, alone) < 1e-5
        passes[len(who), rows] = sum(seen)
    assert passes == {(2, None): 4 + 4 + 4, (2, 1): 8 + 4 + 4, (2, 4): 2 + 1 + 1, (1, 4): 3}
    with pytest.raises(ConfigError, match=r"rows_per_pass: 1 is less than .*_batch_size`, 2, of a member"):
        population.train(parts_of([make_recipe("two")], tmp_path), rows_per_pass=1)


def test_who_else_is_there_and_how_long_changes_no_member(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Dropout above all: with another, without, after it was dropped, and as the rest of a killed generation."""
    made = recipes(make_recipe, 2, "m")
    alone = train(made[1], LocalIO(tmp_path / "alone"), stop_at=4)
    population = Population(made[0])
    first = sound(population.train(parts_of(made, tmp_path / "first", stop_at=2), rows_per_pass=4))
    after = Part(made[1], LocalIO(tmp_path / "after"), first[1].checkpoint, 4)
    (dropped,) = sound(population.train([after], rows_per_pass=4))
    (only,) = sound(population.train(parts_of(made[1:], tmp_path / "only", stop_at=4), rows_per_pass=4))
    assert largest_difference(dropped, alone) < 1e-5
    assert largest_difference(only, alone) < 1e-5


def test_a_run_goes_on_from_what_is_in_its_folder(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """One member has been trained before, one half, one not at all; alone or in a population is the same."""
    made = recipes(make_recipe, 3, "m")
    train(made[0], LocalIO(tmp_path / "m0"))
    train(made[1], LocalIO(tmp_path / "m1"), stop_at=2)
    found = sound(Population(made[0]).train(parts_of(made, tmp_path)))
    for recipe, result in zip(made, found, strict=True):
        alone = train(recipe, LocalIO(tmp_path / "alone" / recipe.name))
        assert largest_difference(result, alone) < 1e-5
    go_on = train(made[2], LocalIO(tmp_path / "m2"))
    assert go_on.step == 6 and largest_difference(go_on, found[2]) == 0


def test_what_is_wrong_with_one_member_ends_that_one(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    made = recipes(make_recipe, 2, "m")
    bad = make_recipe("bad", optim__learning_rate=1e30)
    rows = make_recipe("rows", objective="dpo")
    short = make_recipe("short", data__max_length=512, data__drop_consumed=True, train__save_steps=5)
    members = [made[0], bad, rows, short, made[1]]
    population = Population(made[0])
    (donor,) = sound(population.train(parts_of(made[:1], tmp_path / "donor", stop_at=1)))
    parts = parts_of(members, tmp_path / "together")
    other = Part(make_recipe("other", adapt__r=16), LocalIO(tmp_path / "other"), donor.checkpoint)
    found = population.train([*parts, other])
    assert isinstance(found[5], CheckpointError)
    assert not [name for name, _ in population._model.named_parameters() if "lora_" in name]
    assert isinstance(found[1], TrainError) and "not finite" in str(found[1])
    assert isinstance(found[2], FtrayError) and "preference rows" in str(found[2])
    assert isinstance(found[3], DataError) and "needs rows a second time" in str(found[3])
    assert len(losses_in(tmp_path / "together" / "short")) > 0, "it has begun"
    for recipe, result in ((made[0], found[0]), (made[1], found[4])):
        assert isinstance(result, Result)
        assert largest_difference(result, train(recipe, LocalIO(tmp_path / recipe.name))) < 1e-5


def test_members_errors_are_those_of_the_last_start(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """A worker group whose process dies at the very end is started again, and then all may be well."""
    made = [make_recipe("sound", train__max_steps=1), make_recipe("bad", optim__learning_rate=1e30)]
    parts = parts_of(made, tmp_path)
    for part in parts:
        write_error(part.io.run_dir / FAILED, TrainError("of before"))
    train_members(parts, None)
    assert read_error(tmp_path / "sound" / FAILED) is None
    assert "not finite" in str(read_error(tmp_path / "bad" / FAILED))


class Noticed(LocalIO):
    """The process is sent SIGTERM in the middle of a step."""

    at = -1

    def beat(self, step: int, phase: str = "step") -> None:
        super().beat(step, phase)
        if step == self.at:
            self.at = -1
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_notice_tells_where_every_member_is(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Also those that are over or have failed: from one notice to the next they stay where they are."""
    long, short, bad = make_recipe("long"), make_recipe("short"), make_recipe("bad", objective="dpo")
    found = []
    for at in (2, 4, 4):
        lead = Noticed(tmp_path / "long")
        lead.at = at
        parts = [Part(long, lead), *parts_of([short], tmp_path, stop_at=1), *parts_of([bad], tmp_path)]
        with contextlib.suppress(RunStopped):
            Population(long).train(parts)
        found.append(read_json(tmp_path / "long" / STOPPED)["steps"] if lead.at < 0 else None)
    assert found == [[3, 1, 0], [5, 1, 0], None], "the last one went on after its notice"
    first, second = found[:2]
    assert advanced(first, []) and advanced(second, first) and not advanced(second, second)


def test_what_members_cannot_differ_in_is_told_in_one_line(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    refused = {
        "`full` trains the base": make_recipe(adapt="full"),
        "`auto` is a timing": make_recipe(train__bf16="auto"),
        "steps each member by an optimiser of its own": make_recipe(strategy="deepspeed"),
        "one trace a process": make_recipe(train__profile_steps=1),
        "trains `score.weight`": make_recipe(objective="reward"),
        "dropout 0.1": make_recipe(
            model__model_name_or_path=str(make_base(tmp_path / "gpt2", "gpt2", resid_pdrop=0.1))
        ),
    }
    for words, recipe in refused.items():
        with pytest.raises(ConfigError) as caught:
            Population(recipe)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    one, other = make_recipe("one"), make_recipe("other", train__gradient_checkpointing=True)
    with pytest.raises(ConfigError, match=r"train.gradient_checkpointing: .* one has False and another True"):
        Population(one).train(parts_of([one, other], tmp_path))

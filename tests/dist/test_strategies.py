"""The same recipe at any accumulation, packing, number of ranks and strategy: the same losses.

Every row is in every batch, so that packing changes which row a document is in and nothing else. All runs on
several ranks are made in one start of the processes; the tests look at what they left.
"""

import itertools
import json
import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ftray.config.recipe import Recipe
from ftray.core.errors import ConfigError, FtrayError
from ftray.model.shard import local
from ftray.testing.ranks import in_group, on_ranks
from ftray.train.build import build_model
from tests.dist.grid import REFERENCE, Runs, World, go

Case = dict[str, Any]


WORLDS = [World("ddp", 2), World("fsdp", 1), World("fsdp", 2), World("deepspeed", 2)]
ADAPTS = ["lora", "full"]
CUTS = list(itertools.product([True, False], [1, 4]))
"""Packing, and micro batches of a step on one rank."""
CASES = [
    (world, adapt, *cut)
    for world in [REFERENCE, *WORLDS]
    for adapt in ADAPTS
    # One cut is enough where sharding divides nothing.
    # DeepSpeed's stages have tests of their own; here one cut packed, one not.
    for cut in (
        CUTS[1:2] if world == World("fsdp", 1) else CUTS[1:3] if world.strategy == "deepspeed" else CUTS
    )
]
FEATURES: dict[str, Case] = {
    "untied": {"base": "qwen3"},
    "experts": {"base": "qwen3_moe"},
    "transposed": {"base": "gpt2"},
    "odd-batch": {"train": {"global_batch_size": 3, "per_device_train_batch_size": 1}},
    "checkpointing": {"train": {"gradient_checkpointing": True}},
    "dpo": {"objective": "dpo", "train_rows": "pairs"},
    "reward": {"objective": "reward", "base": "qwen3", "train_rows": "pairs"},
    "capped": {"base": "gemma3"},
    "average": {"train": {"ema_decay": 0.5}},
    "random": {"base": "random"},
    "bf16": {"train": {"bf16": True}},
    "lora-experts": {
        "base": "qwen3_moe",
        "adapt": {"type": "lora", "r": 4, "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]},
    },
    "kept": {"strategy": {"type": "fsdp", "num_workers": 2, "reshard_after_forward": False}},
}


def name_of(world: World, adapt: str, packing: bool, accumulation: int) -> str:
    return f"{world}-{adapt}-{'packed' if packing else 'rows'}-{accumulation}"


Told = tuple[str, tuple[bool, float, bool] | None]


def on_three_ranks(runs: Runs, groups: dict[World, list[Recipe]], chain: list[tuple[Recipe, int]]) -> Told:
    """Body of each rank: the runs of every world, then one run that goes through several worlds."""
    for world, recipes in groups.items():
        in_group(world.size, runs.folder / f"meet-{world}", go, recipes)
    for recipe, stop in chain:
        in_group(recipe.strategy.num_workers, runs.folder / f"meet-chain-{stop}", go, [recipe], stop)
    incomplete = in_group(2, runs.folder / "meet-incomplete", restore_incomplete, runs)
    return incomplete, in_group(2, runs.folder / "meet-infinite", update_with_infinity, runs)


def restore_incomplete(runs: Runs) -> str:
    """What a checkpoint tells that lacks a rank's file."""
    last = max(runs.dir("chain").glob("checkpoints/step-*"))
    manifest = json.loads((last / "manifest.json").read_text())
    manifest["files"] = {
        name: digest for name, digest in manifest["files"].items() if not name.startswith("trainable-1-")
    }
    recipe = runs.recipe("incomplete", world=World("fsdp", 2))
    try:
        recipe.strategy.restore(last, manifest, dict(build_model(recipe).named_parameters()), [])
    except FtrayError as error:
        return str(error)
    return "restored"


def update_with_infinity(runs: Runs) -> tuple[bool, float, bool]:
    """An update where one number in one shard of the last rank is not finite: applied, norm, anything moved."""
    recipe = runs.recipe("infinite", world=World("fsdp", 2))
    parameters = list(build_model(recipe).parameters())
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    before = [local(parameter.detach()).clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    if recipe.strategy.dp_rank == 1:
        assert parameters[3].grad is not None
        local(parameters[3].grad).view(-1)[0] = torch.inf
    update = recipe.strategy.update(parameters, [optimizer], 1.0, sound=True)
    same = all(torch.equal(local(p.detach()), old) for p, old in zip(parameters, before, strict=True))
    return update.applied, update.grad_norm, not same


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All runs of this file, made."""
    runs = Runs(tmp_path_factory.mktemp("strategies"))
    alone = [
        runs.recipe("whole", train={"max_steps": 8, "save_steps": 8}),
        *(runs.cut(f"{REFERENCE}-{adapt}", REFERENCE, adapt, True, 1) for adapt in ADAPTS),
    ]
    groups: dict[World, list[Recipe]] = {world: [] for world in WORLDS}
    for case in CASES:
        (alone if case[0] == REFERENCE else groups[case[0]]).append(runs.cut(name_of(*case), *case))
    for name, changes in FEATURES.items():
        plain = {key: value for key, value in changes.items() if key != "strategy"}
        alone.append(runs.recipe(f"single-{name}", **plain))
        groups[World("fsdp", 2)].append(runs.recipe(f"fsdp-{name}", **{"world": World("fsdp", 2)} | changes))
    for world in (World("ddp", 2), World("fsdp", 2)):
        groups[world].append(runs.cut(f"{world}-again", world, "full", True, 4))
    steps = [(World("fsdp", 2), 2), (World("single", 1), 4), (World("ddp", 2), 6), (World("fsdp", 3), 8)]
    chain = [
        (runs.recipe("chain", world=world, train={"max_steps": 8, "save_steps": 1}), stop)
        for world, stop in steps
    ]
    go(alone)
    runs.told = on_ranks(3, on_three_ranks, runs, groups, chain)
    return runs


@pytest.mark.parametrize(("world", "adapt", "packing", "accumulation"), CASES, ids=str)
def test_same_losses(runs: Runs, world: World, adapt: str, packing: bool, accumulation: int) -> None:
    expected = runs.curve(f"{REFERENCE}-{adapt}")
    assert runs.curve(name_of(world, adapt, packing, accumulation)) == pytest.approx(expected, rel=1e-5)
    assert expected[-2] != pytest.approx(expected[0], rel=0.1), "it learns"


@pytest.mark.parametrize("feature", FEATURES)
def test_sharded_equals_whole(runs: Runs, feature: str) -> None:
    """Tied, untied and capped heads, experts, transposed weights, rows that do not divide, frozen references."""
    rounding = 2e-2 if feature == "bf16" else 1e-5
    reference, ours = (runs.curve(f"{name}-{feature}") for name in ("single", "fsdp"))
    assert len(reference) >= 6 and ours == pytest.approx(reference, rel=rounding)


@pytest.mark.parametrize("world", [World("ddp", 2), World("fsdp", 2)], ids=str)
def test_same_world_is_bit_equal(runs: Runs, world: World) -> None:
    assert runs.curve(f"{world}-again") == runs.curve(name_of(world, "full", True, 4))


def test_one_run_through_four_worlds(runs: Runs) -> None:
    """Two shards, one process, two replicas, three shards: parameters and moments go along."""
    assert runs.curve("chain") == pytest.approx(runs.curve("whole"), rel=1e-5)
    last = max(runs.dir("chain").glob("checkpoints/step-*"))
    names = {path.name for path in last.glob("*.safetensors")}
    assert names == {f"{kind}-{k}-of-3.safetensors" for kind in ("trainable", "optimizer") for k in range(3)}
    told = runs.told[0][0]
    assert "pieces of `" in told and "are missing; use another checkpoint" in told


def test_what_is_not_finite_in_one_shard_moves_nothing_anywhere(runs: Runs) -> None:
    assert [told[1] for told in runs.told] == [(False, math.inf, False), (False, math.inf, False), None]


@pytest.mark.parametrize("feature", ["untied", "experts", "transposed", "checkpointing"])
def test_what_was_sharded_loads_in_plain_transformers(runs: Runs, feature: str) -> None:
    one, two = (
        AutoModelForCausalLM.from_pretrained(runs.dir(f"{name}-{feature}") / "delta")
        for name in ("single", "fsdp")
    )
    # Not the weights: those without an effect (GPT-2's biases of keys) move by rounding alone.
    ids = torch.arange(2, 40)[None]
    torch.testing.assert_close(two(ids).logits, one(ids).logits, rtol=1e-3, atol=1e-3)
    assert [name for name, _ in one.named_parameters()] == [name for name, _ in two.named_parameters()]
    ours, theirs = (model.config.to_dict() | {"_name_or_path": ""} for model in (two, one))
    assert ours == theirs and type(one) is type(two)


def test_muon_is_refused_for_shards_of_matrices(runs: Runs) -> None:
    with pytest.raises(
        ConfigError, match="`muon` orthogonalises whole matrices, but with strategy `fsdp` each worker holds"
    ):
        runs.recipe("muon", world=World("fsdp", 2), optim="muon")
    assert runs.recipe("muon", world=World("fsdp", 2), optim="muon", adapt="lora").optim.momentum

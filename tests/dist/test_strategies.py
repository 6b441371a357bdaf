"""The same recipe at any accumulation, packing, number of ranks and strategy: the same losses.

Every row is in every batch, so that packing changes which row a document is in and nothing else. All runs on
several ranks are made in one start of the processes; the tests look at what they left.
"""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ftray.config.recipe import Recipe
from ftray.core.errors import ConfigError, FtrayError
from ftray.core.spec import parse
from ftray.data.prepare import prepare_local
from ftray.data.read import Shards
from ftray.testing import tiny
from ftray.testing.ranks import in_group, on_ranks
from ftray.train.build import build_model
from ftray.train.io import LocalIO
from ftray.train.track.jsonl import read_records
from ftray.train.worker import train

NUM_DOCUMENTS = 8
Case = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class World:
    """A strategy on a number of ranks."""

    strategy: str
    size: int

    def __str__(self) -> str:
        return f"{self.strategy}{self.size}"

    @property
    def config(self) -> Any:
        return "single" if self.strategy == "single" else {"type": self.strategy, "num_workers": self.size}


REFERENCE = World("single", 1)
WORLDS = [World("ddp", 2), World("fsdp", 1), World("fsdp", 2)]
ADAPTS = ["lora", "full"]
CUTS = list(itertools.product([True, False], [1, 4]))
"""Packing, and micro batches of a step on one rank."""
CASES = [
    (world, adapt, *cut)
    for world in [REFERENCE, *WORLDS]
    for adapt in ADAPTS
    # One cut is enough where sharding divides nothing.
    for cut in (CUTS[1:2] if world == World("fsdp", 1) else CUTS)
]
FEATURES: dict[str, Case] = {
    "untied": {"base": "qwen3"},
    "experts": {"base": "qwen3_moe"},
    "transposed": {"base": "gpt2"},
    "odd-batch": {"train": {"global_batch_size": 3, "per_device_train_batch_size": 1}},
    "checkpointing": {"train": {"gradient_checkpointing": True}},
    "dpo": {"objective": "dpo", "train_rows": "pairs"},
    "reward": {"objective": "reward", "base": "qwen3", "train_rows": "pairs"},
    "lora-experts": {
        "base": "qwen3_moe",
        "adapt": {"type": "lora", "r": 4, "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]},
    },
    "kept": {"strategy": {"type": "fsdp", "num_workers": 2, "reshard_after_forward": False}},
}


def name_of(world: World, adapt: str, packing: bool, accumulation: int) -> str:
    return f"{world}-{adapt}-{'packed' if packing else 'rows'}-{accumulation}"


class Runs:
    """Recipes over one small corpus, and what became of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.told = folder, ""
        words = ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel"]
        rows = [
            {
                "prompt": f"{words[i % 8]}-{i:03d}\n# Answer:",
                "completion": " " + words[i % 8][0] * (2 + i % 5),
            }
            for i in range(NUM_DOCUMENTS + 3)
        ]
        self._write("train", rows[:NUM_DOCUMENTS])
        self._write("validation", rows[NUM_DOCUMENTS:])
        answers = [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no"} for row in rows[:4]
        ]
        self._write("pairs", answers)
        for name in ("llama", "qwen3", "qwen3_moe", "gpt2"):
            tiny.tiny_base(folder / name, name)

    def _write(self, name: str, rows: list[dict[str, str]]) -> None:
        (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def recipe(
        self,
        name: str,
        *,
        base: str = "llama",
        world: World = REFERENCE,
        packing: bool = True,
        train_rows: str = "train",
        **changes: Any,
    ) -> Recipe:
        plain = train_rows == "train"
        tree = {
            "name": name,
            "output_dir": str(self.folder / "runs"),
            "model": {"model_name_or_path": str(self.folder / base)},
            "data": {
                "train": str(self.folder / f"{train_rows}.jsonl"),
                "validation": str(self.folder / "validation.jsonl") if plain else [],
                "max_length": 64,
                "packing": packing,
                "cache_dir": str(self.folder / "cache"),
            },
            "adapt": "full",
            "objective": "sft",
            "optim": {"type": "adamw", "learning_rate": 5e-3},
            "lr_scheduler": "linear",
            "strategy": world.config,
            **changes,
            "train": {
                "max_steps": 3,
                "global_batch_size": NUM_DOCUMENTS,
                "per_device_train_batch_size": NUM_DOCUMENTS,
                "bf16": False,
                **changes.get("train", {}),
            },
        }
        return parse(Recipe, tree)

    def cut(self, name: str, world: World, adapt: str, packing: bool, accumulation: int) -> Recipe:
        """All documents in each step, packed or not, in one micro batch or in four (by ranks: fewer)."""
        probe = self.recipe("probe", packing=packing)
        rows = len(Shards(prepare_local(probe.data, probe.model.tokenizer, "train")))
        assert (rows < NUM_DOCUMENTS) == packing and rows % 4 == 0
        batches = {"global_batch_size": rows, "per_device_train_batch_size": rows // accumulation}
        settings = {"type": "lora", "r": 4} if adapt == "lora" else adapt
        return self.recipe(name, world=world, adapt=settings, packing=packing, train=batches)

    def dir(self, name: str) -> Path:
        return self.folder / "runs" / name

    def curve(self, name: str) -> list[float]:
        """Losses and gradient norms of the steps, and the last validation loss if there is one."""
        records = read_records(self.dir(name) / "metrics.jsonl")
        steps = [(record["loss"], record["grad_norm"]) for record in records if "grad_norm" in record]
        last = [value for record in records[-1:] if (value := record.get("eval_loss")) is not None]
        return [*itertools.chain(*steps), *last]


def go(recipes: list[Recipe], stop_at: int | None = None) -> None:
    for recipe in recipes:
        train(recipe, LocalIO(Path(recipe.output_dir) / recipe.name), stop_at=stop_at)


def on_three_ranks(runs: Runs, groups: dict[World, list[Recipe]], chain: list[tuple[Recipe, int]]) -> str:
    """Body of each rank: the runs of every world, then one run that goes through several worlds."""
    for world, recipes in groups.items():
        in_group(world.size, runs.folder / f"meet-{world}", go, recipes)
    for recipe, stop in chain:
        in_group(recipe.strategy.num_workers, runs.folder / f"meet-chain-{stop}", go, [recipe], stop)
    return in_group(2, runs.folder / "meet-incomplete", restore_incomplete, runs) or ""


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
    runs.told = on_ranks(3, on_three_ranks, runs, groups, chain)[0]
    return runs


@pytest.mark.parametrize(("world", "adapt", "packing", "accumulation"), CASES, ids=str)
def test_same_losses(runs: Runs, world: World, adapt: str, packing: bool, accumulation: int) -> None:
    expected = runs.curve(f"{REFERENCE}-{adapt}")
    assert runs.curve(name_of(world, adapt, packing, accumulation)) == pytest.approx(expected, rel=1e-5)
    assert expected[-2] != pytest.approx(expected[0], rel=0.1), "it learns"


@pytest.mark.parametrize("feature", FEATURES)
def test_sharded_equals_whole(runs: Runs, feature: str) -> None:
    """Tied and untied heads, experts, transposed weights, rows that do not divide, recomputation, references."""
    reference, ours = (runs.curve(f"{name}-{feature}") for name in ("single", "fsdp"))
    assert len(reference) >= 6 and ours == pytest.approx(reference, rel=1e-5)


@pytest.mark.parametrize("world", [World("ddp", 2), World("fsdp", 2)], ids=str)
def test_same_world_is_bit_equal(runs: Runs, world: World) -> None:
    assert runs.curve(f"{world}-again") == runs.curve(name_of(world, "full", True, 4))


def test_one_run_through_four_worlds(runs: Runs) -> None:
    """Two shards, one process, two replicas, three shards: parameters and moments go along."""
    assert runs.curve("chain") == pytest.approx(runs.curve("whole"), rel=1e-5)
    last = max(runs.dir("chain").glob("checkpoints/step-*"))
    names = {path.name for path in last.glob("*.safetensors")}
    assert names == {f"{kind}-{k}-of-3.safetensors" for kind in ("trainable", "optimizer") for k in range(3)}
    assert "pieces of `" in runs.told and "are missing; use another checkpoint" in runs.told


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

"""A population on two ranks, replicated and sharded: each member is its run alone in one process."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ftray.config.recipe import Recipe
from ftray.testing.ranks import on_ranks
from ftray.train.io import LocalIO
from ftray.train.population import Part, Population
from ftray.train.run import Result
from tests.dist.grid import Runs, World, go

WORLDS = [World("ddp", 2), World("fsdp", 2)]
MEMBERS: list[dict[str, Any]] = [
    {"adapt": {"type": "lora", "r": 4}, "train": {"max_grad_norm": 0.05}},
    {"adapt": {"type": "lora", "r": 2}, "optim": {"type": "adamw", "learning_rate": 1e-3}},
    {"adapt": {"type": "lora", "r": 8}, "train": {"global_batch_size": 3, "per_device_train_batch_size": 1}},
    {"adapt": {"type": "lora", "r": 4, "lora_dropout": 0.3}},
]
SECOND = 2
"""Step of the exploit: the first member takes over from the third."""


def members(runs: Runs, world: World, prefix: str) -> list[Recipe]:
    return [
        runs.recipe(f"{world}-{prefix}{number}", world=world, **changes)
        for number, changes in enumerate(MEMBERS)
    ]


def parts(runs: Runs, recipes: list[Recipe], donors: list[Path | None], **settings: Any) -> list[Part]:
    pairs = zip(recipes, donors, strict=True)
    return [Part(recipe, LocalIO(runs.dir(recipe.name)), donor, **settings) for recipe, donor in pairs]


def population(runs: Runs, world: World) -> list[list[Path | None]]:
    """Two generations; deltas of the second, and of who took over once more, from the donor's files."""
    first, taken = members(runs, world, "first"), members(runs, world, "second")
    taken[0], again = (
        runs.recipe(f"{world}-{name}", world=world, **MEMBERS[2], seed=5) for name in ("taken", "again")
    )
    owner = Population(first[0])
    owner.train(parts(runs, first, [None] * 4, stop_at=SECOND))
    paths = [runs.dir(recipe.name) / "checkpoints" / f"step-{SECOND:08d}" for recipe in first]
    in_memory = owner.train(parts(runs, taken, [paths[2], *paths[1:]]))
    from_files = Population(first[0]).train(parts(runs, [again], [paths[2]]))
    return [[_delta(result) for result in results] for results in (in_memory, from_files)]


def _delta(result: Any) -> Path | None:
    assert isinstance(result, Result), result
    return result.delta


def on_each_rank(runs: Runs) -> dict[str, list[list[Path | None]]]:
    """Body of each rank."""
    found = {}
    for world in WORLDS:
        found[str(world)] = population(runs, world)
        go(members(runs, world, "alone")[3:])
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("population"))
    go(members(runs, World("single", 1), "alone")[:3])
    runs.told = on_ranks(2, on_each_rank, runs)
    return runs


def difference(one: Path, other: Path) -> float:
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    assert ours.keys() == theirs.keys()
    return max(float((tensor - theirs[name]).abs().max()) for name, tensor in ours.items())


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_each_member_is_its_run_alone(runs: Runs, world: World) -> None:
    """In one process; dropout, which differs from rank to rank, on as many."""
    in_memory, _ = runs.told[0][str(world)]
    for number in (1, 2):
        assert difference(in_memory[number], runs.dir(f"single1-alone{number}") / "delta") < 1e-4
    assert difference(in_memory[3], runs.dir(f"{world}-alone3") / "delta") < 1e-5


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_an_exploit_in_memory_is_one_from_files(runs: Runs, world: World) -> None:
    """On every rank: replicas that differed would give other weights after the next step."""
    in_memory, from_files = runs.told[0][str(world)]
    assert difference(in_memory[0], from_files[0]) < 1e-6
    assert difference(in_memory[0], in_memory[2]) > 1e-4  # another seed: other rows

"""A population on two ranks, replicated and sharded: each member is its run alone in one process."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from ftray.config.recipe import Recipe
from ftray.core.errors import FtrayError
from ftray.core.fs import lock_file
from ftray.testing.ranks import on_ranks
from ftray.train import io
from ftray.train.io import LocalIO
from ftray.train.population import Part, Population
from ftray.train.run import Result
from ftray.train.track.jsonl import read_records
from tests.dist.grid import Runs, World, go

WORLDS = [
    pytest.param(World("ddp", 2), id="ddp"),
    pytest.param(World("fsdp", 2), id="fsdp", marks=pytest.mark.slow),
]
SGD = {"type": "torch", "optimizer": "SGD", "learning_rate": 0.5}
"""Moves by the gradient's size, which Adam does not."""
MEMBERS: list[dict[str, Any]] = [
    {"adapt": {"type": "lora", "r": 4}, "optim": SGD, "train": {"max_grad_norm": 0.05}},
    {"adapt": {"type": "lora", "r": 2}, "optim": {"type": "adamw", "learning_rate": 1e-3}},
    {"adapt": {"type": "lora", "r": 8}, "train": {"global_batch_size": 3, "per_device_train_batch_size": 1}},
    {"adapt": {"type": "lora", "r": 4, "lora_dropout": 0.3}},
]
SECOND = 2
"""Step of the exploit: the first member takes over from the third."""


@dataclasses.dataclass
class Group:
    """What came of a population on two ranks: folders of deltas."""

    runs: Runs
    world: World
    first: list[Path]
    second: list[Path]
    from_files: list[Path]

    def alone(self, number: int) -> Path:
        """Of the same member in one process."""
        return self.runs.dir(f"single1-alone{number}") / "delta"


def members(runs: Runs, world: World, prefix: str) -> list[Recipe]:
    return [
        runs.recipe(f"{world}-{prefix}{number}", world=world, **changes)
        for number, changes in enumerate(MEMBERS)
    ]


def parts(runs: Runs, recipes: list[Recipe], donors: list[Path | None], **settings: Any) -> list[Part]:
    pairs = zip(recipes, donors, strict=True)
    return [Part(recipe, LocalIO(runs.dir(recipe.name)), donor, **settings) for recipe, donor in pairs]


def population(runs: Runs, world: World) -> list[list[Path | None]]:
    """Two generations: deltas of both, and of who took over once more, from the donor's files."""
    first, taken = members(runs, world, "first"), members(runs, world, "second")
    taken[0], again = (
        runs.recipe(f"{world}-{name}", world=world, **MEMBERS[2], seed=5) for name in ("taken", "again")
    )
    owner = Population(first[0])
    begun = owner.train(parts(runs, first, [None] * 4, stop_at=SECOND))
    paths = [runs.dir(recipe.name) / "checkpoints" / f"step-{SECOND:08d}" for recipe in first]
    in_memory = owner.train(parts(runs, taken, [paths[2], *paths[1:]]))
    from_files = Population(first[0]).train(parts(runs, [again], [paths[2]]))
    return [[_delta(result) for result in results] for results in (begun, in_memory, from_files)]


def _delta(result: Any) -> Path | None:
    assert isinstance(result, Result), result
    return result.delta


def on_each_rank(runs: Runs, world: World) -> list[list[Path | None]]:
    """Body of each rank."""
    found = population(runs, world)
    go(members(runs, world, "alone")[3:])
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("population"))
    recipes = members(runs, World("single", 1), "alone")
    go(recipes[:1], stop_at=SECOND)
    go(recipes[1:3])
    return runs


@pytest.fixture(scope="module", params=WORLDS)
def group(request: pytest.FixtureRequest, alone: Runs) -> Group:
    return Group(alone, request.param, *on_ranks(2, on_each_rank, alone, request.param)[0])


def difference(one: Path, other: Path) -> float:
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    assert ours.keys() == theirs.keys()
    return max(float((tensor - theirs[name]).abs().max()) for name, tensor in ours.items())


def test_each_member_is_its_run_alone(group: Group) -> None:
    """In one process; dropout, which differs from rank to rank, on as many."""
    for number in (1, 2):
        assert difference(group.second[number], group.alone(number)) < 1e-4
    solo = group.runs.dir(f"{group.world}-alone3") / "delta"
    assert difference(group.second[3], solo) < 1e-5


def test_each_member_s_gradient_is_clipped_by_its_own_norm(group: Group) -> None:
    """That of the first member alone, over all ranks: it is above its limit in every step."""
    assert difference(group.first[0], group.alone(0)) < 1e-4
    records = read_records(group.first[0].parent / "metrics.jsonl")
    norms = [record["grad_norm"] for record in records if "grad_norm" in record]
    assert len(norms) == SECOND and min(norms) > 2 * MEMBERS[0]["train"]["max_grad_norm"]


def test_an_exploit_in_memory_is_one_from_files(group: Group) -> None:
    """On every rank: replicas that differed would give other weights after the next step."""
    assert difference(group.second[0], group.from_files[0]) < 1e-6
    assert difference(group.second[0], group.second[2]) > 1e-4  # another seed: other rows


def disagreeing(runs: Runs, damaged: Path, donor: Path) -> tuple[list[str], str]:
    """What each rank says of four members, of which two cannot begin on one rank; then of one rank's full disk."""
    world, rank = World("ddp", 2), dist.get_rank()
    ends = {"max_steps": 1}
    made = [runs.recipe(f"disagree{n}", world=world, **MEMBERS[1], train=ends, seed=n) for n in range(4)]
    donors = [None, None, damaged if rank else donor, None]
    patience, io._CLAIM_WAIT_S = io._CLAIM_WAIT_S, 0.1
    try:
        found = Population(made[0]).train(parts(runs, made, donors))
    finally:
        io._CLAIM_WAIT_S = patience
    write = runs.recipe("write", world=world, **MEMBERS[1], train={"save_steps": 1})
    folder = runs.dir(f"write{rank}")
    folder.mkdir(parents=True)
    if rank == 0:
        (folder / "checkpoints").touch()
    try:
        written = str(Population(write).train([Part(write, LocalIO(folder))]))
    except (FtrayError, RuntimeError) as error:  # the other rank finds that this one has left
        written = type(error).__name__
    return [str(one) if isinstance(one, FtrayError) else "" for one in found], written


def test_what_one_rank_alone_meets_ends_the_member_on_all(alone: Runs, tmp_path: Path) -> None:
    """A folder that another process holds, known to rank 0; a checkpoint that only rank 1 finds damaged.

    A rank that went on alone would be a collective behind for good.
    """
    donor = alone.dir("single1-alone1") / "checkpoints" / "step-00000003"
    damaged = shutil.copytree(donor, tmp_path / "damaged")
    next(damaged.glob("*.safetensors")).write_bytes(b"")
    held = alone.dir("disagree1")
    held.mkdir(parents=True)
    lock = lock_file(held / "run.lock", 0)
    assert lock is not None
    with lock:
        (one, written), (two, _) = on_ranks(2, disagreeing, alone, damaged, donor)
    assert one[1] == two[1] and "another process trains here" in one[1]
    assert "another rank" in one[2] and str(damaged) in two[2]
    assert [one[n] + two[n] for n in (0, 3)] == ["", ""], "the others are trained to their end"
    assert written == "CheckpointError", "it ends the group, which can agree on nothing any more"

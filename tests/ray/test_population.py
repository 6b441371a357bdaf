"""Populations in the trials of a search over Ray: groups of them, killed ones, and such as have several workers."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ftray.config.load import write_resolved
from ftray.config.recipe import Recipe
from ftray.config.tune import TuneConfig
from ftray.core.errors import RunStopped
from ftray.core.fs import read_json, write_json
from ftray.core.spec import parse, replace, spec
from ftray.tune.journal import Record, read
from ftray.tune.local import run_local
from ftray.tune.ray_trials import run
from ftray.tune.result import TuneResult
from tests.recipes import MakeRecipe

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

STEPS = 2
"""Of a segment."""


@spec
class Faulty:
    """A constant schedule, and a file of faults: at the step of the first one it is taken out and happens.

    A fault is a step and a folder of segments that are asked to stop; without one the process is killed.
    """

    faults: str

    def scale(self, step: int, progress: float) -> float:
        """1."""
        del progress
        file = Path(self.faults)
        if file.exists() and (faults := read_json(file)) and step == faults[0][0]:
            write_json(file, faults[1:])
            if not faults[0][1]:
                os.kill(os.getpid(), signal.SIGKILL)
            for folder in Path(faults[0][1]).iterdir():
                (folder / "stop").touch()
        return 1.0


@pytest.fixture
def recipe(make_recipe: MakeRecipe, tmp_path: Path) -> Recipe:
    return make_recipe(
        train__global_batch_size=2,
        train__save_steps=1,
        data__max_length=64,
        lr_scheduler={"type": f"{__name__}:Faulty", "faults": str(tmp_path / "faults.json")},
    )


def search(folder: Path, recipe: Recipe, name: str, **changes: Any) -> TuneConfig:
    write_resolved(recipe, folder / "recipe.yaml")
    settings = {
        "name": name,
        "output_dir": str(folder),
        "recipe": str(folder / "recipe.yaml"),
        "space": {
            "optim.learning_rate": {"loguniform": [1e-3, 1e-1]},
            "adapt.r": {"choice": [2, 4]},
            "adapt.lora_dropout": {"choice": [0.0, 0.1]},
        },
        "executor": {"type": "population", "num_populations": 2},
        "num_members": 4,
        "num_segments": 3,
        "segment_steps": STEPS,
        "cpus_per_trial": 0.5,
    }
    return parse(TuneConfig, settings | changes)


def decisions(result: TuneResult) -> list[tuple[int, int, dict[str, Any]]]:
    return [
        (d["member"], d["donor"], d["config"]) for r in read(result.journal) for d in r.get("decisions", [])
    ]


def of_kind(result: TuneResult, kind: str) -> list[Record]:
    return [record for record in read(result.journal) if record["kind"] == kind]


def scores(result: TuneResult) -> dict[tuple[int, int], float]:
    return {(r["member"], r["segment"]): r["score"] for r in of_kind(result, "commit")}


def difference(one: TuneResult, other: TuneResult) -> float:
    """Largest difference of the winners' weights."""
    assert one.delta and other.delta
    ours, theirs = (load_file(r.delta / "adapter_model.safetensors") for r in (one, other) if r.delta)
    assert ours.keys() == theirs.keys()
    return max(float((tensor - theirs[name]).abs().max()) for name, tensor in ours.items())


def same(one: TuneResult, other: TuneResult, tolerance: float) -> None:
    assert decisions(one) == decisions(other) and decisions(one)
    assert scores(one) == pytest.approx(scores(other), rel=tolerance)
    assert (one.member, one.lineage, one.config) == (other.member, other.lineage, other.config)
    assert difference(one, other) <= tolerance


def group_of(record: Record) -> int:
    return int(record["member"]) // 2


def test_groups_side_by_side_are_one_search_through_kills(recipe: Recipe, tmp_path: Path) -> None:
    """In the midst of the second segment and of the third; all is as if nothing had been."""
    alone = run_local(search(tmp_path, recipe, "alone"), recipe)
    write_json(tmp_path / "faults.json", [[STEPS + 1, ""], [2 * STEPS + 1, ""]])
    result = run(search(tmp_path, recipe, "groups"))
    assert not read_json(tmp_path / "faults.json"), "two processes were killed"
    same(result, alone, 1e-6)
    fails = of_kind(result, "fail")
    assert len(fails) == 4 and not any(record["final"] for record in fails)
    assert all("the process of 2 members died" in record["reason"] for record in fails)
    starts = of_kind(result, "start")
    across = [r for r in starts if r["checkpoint"] and int(r["checkpoint"][1:4]) // 2 != group_of(r)]
    assert across, "no member has gone on from one of the other group"
    assert result.num_drivers == 1 and result.num_segments == 12


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_group_of_workers_trains_as_one_process_does(recipe: Recipe, tmp_path: Path, strategy: str) -> None:
    """A worker is killed, later the search asked to stop; one member's numbers stop being finite, and it alone."""
    recipe = replace(recipe, "strategy", {"type": strategy, "num_workers": 2, "cpus_per_worker": 0.5})
    space = {"optim.learning_rate": {"choice": [1e-3, 3e-3, 1e-2, 1e30]}, "adapt.r": {"choice": [2, 4]}}
    changes = {"space": space, "num_members": 3, "num_segments": 2, "executor": "population", "seed": 5}
    alone = run_local(search(tmp_path, recipe, "alone", **changes), recipe)
    assert len(of_kind(alone, "fail")) == 1

    config = search(tmp_path, recipe, "spread", spread=True, **changes)
    segments = tmp_path / "spread" / "segments"
    write_json(tmp_path / "faults.json", [[1, ""], [STEPS, str(segments)]])
    with pytest.raises(RunStopped, match=f"stopped after step {STEPS + 1} "):
        run(config)
    assert not read_json(tmp_path / "faults.json"), "both faults happened"
    result = run(config, resume=True)
    same(result, alone, 1e-3)
    ours, theirs = (of_kind(r, "fail") for r in (result, alone))
    assert [(r["member"], r["segment"], r["final"]) for r in ours] == [
        (r["member"], r["segment"], r["final"]) for r in theirs
    ]
    assert "not finite" in ours[0]["reason"]
    for record in of_kind(result, "commit"):
        saved = read_json(segments / record["checkpoint"] / "segment.json")
        assert saved["checkpoint"] and saved["delta"] and saved["delta_digest"]
    assert len(list(segments.glob("*-s00?-*/progress/rank-1.json"))) == 2, "a group of two for each segment"

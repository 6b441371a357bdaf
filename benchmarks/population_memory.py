"""What members that share one base hold in memory, against as many runs; part of `benchmarks.population`.

The base is in bfloat16 on disk, as most are published, and in float32 in memory, so that each process has a copy.
Of weights that stay in the type of their file, all processes of a machine with Linux share the pages of the file's
mapping: what is then left to save are the processes themselves. Both are measured.
"""

import gc
import itertools
import multiprocessing
import shutil
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.measure import pss_bytes

MEMBERS = 8
RANK = 8
TOKENS = (32, 512)
BASES = {"": "narrow", "_shared_file": "base"}
"""Ends of the names of figures, and the folders of the bases that they are of."""
_STEPS = 3
"""Steps of each of the two rounds after which memory is looked at."""


def _hold(
    connection: Connection,
    recipes: Sequence[Any],
    runs: Path,
    rows_per_pass: int | None,
) -> None:
    """Body of a measured process: import, be looked at, train twice, be looked at before the second ends.

    One member trains as any run does, several as a population; in the second round each goes on from another.
    """
    import torch

    from ftray.train.io import LocalIO
    from ftray.train.population import Part, Population
    from ftray.train.worker import train

    connection.send("imported")
    connection.recv()
    torch.set_num_threads(1)

    looked: list[int] = []  # the members of a population all say that they end

    def be_looked_at() -> None:
        gc.collect()
        connection.send("trained")
        connection.recv()

    class Watched(LocalIO):
        """Is looked at once its training is done and everything of it still there."""

        def beat(self, step: int, phase: str = "step") -> None:
            super().beat(step, phase)
            if phase == "end" and self.run_dir.name == f"1-{recipes[0].name}" and not looked:
                looked.append(step)
                be_looked_at()

    donors: list[Path | None] = [None] * len(recipes)
    population = Population(recipes[0]) if len(recipes) > 1 else None
    for round_number in range(2):
        places = [Watched(runs / f"{round_number}-{recipe.name}") for recipe in recipes]
        stop_at = (round_number + 1) * _STEPS
        parts = [Part(*found, stop_at) for found in zip(recipes, places, donors, strict=True)]
        if population is None:
            found = [train(recipes[0], places[0], start_from=donors[0], stop_at=stop_at)]
        else:
            found = population.train(parts, rows_per_pass=rows_per_pass)  # type: ignore[assignment]
        donors = [result.checkpoint for result in found[1:] + found[:1]]
        gc.collect()  # a run begun beside another's model would count both


def member_recipe(folder: Path, tokens: int, number: int, max_steps: int = 100, base: str = "base") -> Any:
    """A measured member: one row of so many tokens a step."""
    from benchmarks.train.setup import make_recipe

    return make_recipe(
        folder,
        tokens,
        name=f"m{number}",
        model={"model_name_or_path": str(folder / base)},
        adapt={"type": "lora", "r": RANK},
        train={
            "bf16": False,
            "global_batch_size": 1,
            "per_device_train_batch_size": 1,
            "max_steps": max_steps,
        },
    )


def held_bytes(folder: Path, groups: Sequence[Sequence[Any]], rows_per_pass: int | None = None) -> int:
    """Memory over their imports of processes that each train a group of members, given by their recipes."""
    context = multiprocessing.get_context("spawn")
    pipes, started = [], []
    with tempfile.TemporaryDirectory(dir=folder) as runs:
        for recipes in groups:
            here, there = context.Pipe()
            started.append(context.Process(target=_hold, args=(there, recipes, Path(runs), rows_per_pass)))
            started[-1].start()
            pipes.append(here)
        found = []
        for _ in ("imported", "trained"):
            for pipe in pipes:
                pipe.recv()
            found.append(pss_bytes())
            for pipe in pipes:
                pipe.send("go on")
        for process in started:
            process.join()
    return found[1] - found[0]


def memory(folder: Path, tokens: int, base: str) -> dict[str, float]:
    """One process with all members, and as many processes with one each."""
    from ftray.data.prepare import prepare_local

    every = [member_recipe(folder, tokens, number, base=base) for number in range(MEMBERS)]
    prepare_local(every[0].data, every[0].model.tokenizer, "train")
    one = held_bytes(folder, [every])
    many = held_bytes(folder, [[recipe] for recipe in every])
    in_turn = held_bytes(folder, [every], rows_per_pass=1)
    return {
        "ratio": round(one / many, 3),
        "ratio_one_row_a_pass": round(in_turn / many, 3),
        "population_mib": round(one / 2**20, 1),
        "population_one_row_a_pass_mib": round(in_turn / 2**20, 1),
        "processes_mib": round(many / 2**20, 1),
    }


def _narrow(folder: Path) -> None:
    """Write the base again, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    wide, narrow = folder / BASES["_shared_file"], folder / BASES[""]
    shutil.copytree(wide, narrow)
    AutoModelForCausalLM.from_pretrained(wide, dtype=torch.bfloat16).save_pretrained(narrow)


_FORMULA = "(W + K m) / (K (W + m)): W bytes of the base, m of a member's factors, moments and activations"


def measure_memory(lengths: Sequence[int] = TOKENS) -> dict[str, Any]:
    """Memory of both ways, at each number of tokens."""
    from benchmarks.train.setup import prepare_folder

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        prepare_folder(Path(name))
        _narrow(Path(name))
        for tokens, (end, base) in itertools.product(lengths, BASES.items()):
            found[f"population_memory_ratio_k8_{tokens}{end}"] = memory(Path(name), tokens, base)
    return found | {"population_memory_formula": _FORMULA}

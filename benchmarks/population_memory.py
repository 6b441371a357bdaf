"""What members that share one base hold in memory, against as many runs; part of `benchmarks.population`."""

import gc
import multiprocessing
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.measure import pss_bytes

MEMBERS = 8
RANK = 8
TOKENS = (32, 512)
_STEPS = 3
"""Steps of each of the two rounds after which memory is looked at."""


def _hold(
    connection: Connection,
    folder: Path,
    runs: Path,
    members: Sequence[int],
    tokens: int,
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
            if phase == "end" and self.run_dir.name == f"1-{members[0]}" and not looked:
                looked.append(step)
                be_looked_at()

    recipes = [member_recipe(folder, tokens, number) for number in members]
    donors: list[Path | None] = [None] * len(members)
    population = Population(recipes[0]) if len(members) > 1 else None
    for round_number in range(2):
        places = [Watched(runs / f"{round_number}-{number}") for number in members]
        stop_at = (round_number + 1) * _STEPS
        parts = [Part(*found, stop_at) for found in zip(recipes, places, donors, strict=True)]
        if population is None:
            found = [train(recipes[0], places[0], start_from=donors[0], stop_at=stop_at)]
        else:
            found = population.train(parts, rows_per_pass=rows_per_pass)  # type: ignore[assignment]
        donors = [result.checkpoint for result in found[1:] + found[:1]]


def member_recipe(folder: Path, tokens: int, number: int) -> Any:
    """A member of the measured processes: one row of so many tokens a step."""
    from benchmarks.train.setup import make_recipe

    return make_recipe(
        folder,
        tokens,
        name=f"m{number}",
        adapt={"type": "lora", "r": RANK},
        train={"bf16": False, "global_batch_size": 1, "per_device_train_batch_size": 1, "max_steps": 100},
    )


def held_bytes(
    folder: Path, groups: Sequence[Sequence[int]], tokens: int, rows_per_pass: int | None = None
) -> int:
    """Memory over their imports of processes that each train a group of members."""
    context = multiprocessing.get_context("spawn")
    pipes, started = [], []
    with tempfile.TemporaryDirectory(dir=folder) as runs:
        for members in groups:
            here, there = context.Pipe()
            arguments = (there, folder, Path(runs), members, tokens, rows_per_pass)
            started.append(context.Process(target=_hold, args=arguments))
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


def memory(folder: Path, tokens: int) -> dict[str, float]:
    """One process with all members, and as many processes with one each."""
    from ftray.data.prepare import prepare_local

    every = range(MEMBERS)
    recipe = member_recipe(folder, tokens, 0)
    prepare_local(recipe.data, recipe.model.tokenizer, "train")
    one = held_bytes(folder, [every], tokens)
    many = held_bytes(folder, [[number] for number in every], tokens)
    in_turn = held_bytes(folder, [every], tokens, rows_per_pass=1)
    return {
        "ratio": round(one / many, 3),
        "ratio_one_row_a_pass": round(in_turn / many, 3),
        "population_mib": round(one / 2**20, 1),
        "population_one_row_a_pass_mib": round(in_turn / 2**20, 1),
        "processes_mib": round(many / 2**20, 1),
    }


_FORMULA = "(W + K m) / (K (W + m)): W bytes of the base, m of a member's factors, moments and activations"


def measure_memory() -> dict[str, Any]:
    """Memory of both ways, at each number of tokens."""
    from benchmarks.train.setup import prepare_folder

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        prepare_folder(Path(name))
        for tokens in TOKENS:
            found[f"population_memory_ratio_k8_{tokens}"] = memory(Path(name), tokens)
    return found | {"population_memory_formula": _FORMULA}

"""What members that share one base take, against as many that have one each.

    python -m benchmarks.population --json

`population_ratio_k8`: tokens per CPU-second of 8 members stepped together over those of the same 8 one by one,
whole optimiser steps of the same engines, interleaved, by the median of the rounds.
`population_memory_ratio_k8`: proportional set size over what the imports take, of one process with 8 members over
that of 8 processes with one each, after some steps.
`exploit_ms`: a member's weights and moments copied in memory, against committed to a checkpoint and read back.
"""

import argparse
import gc
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.measure import pss_bytes

MEMBERS = 8
RANK = 8
TOKENS = (32, 512)
_SETTLING = 2
"""Steps before memory is looked at or time is taken."""


class Group:
    """Members over one Llama of 25M parameters with random weights.

    Args:
        count: members.
    """

    def __init__(self, count: int) -> None:
        import torch

        from benchmarks.train.setup import LLAMA
        from ftray.config.recipe import Recipe
        from ftray.core.spec import parse
        from ftray.model.policy import Policy
        from ftray.optim.first_order import FirstOrder
        from ftray.train.build import build_model, build_optimizers

        torch.set_num_threads(1)
        tree = {
            "name": "population",
            "model": {"init": "config", "config": LLAMA, "tokenizer_name_or_path": "none"},
            "data": {"train": "none"},
            "adapt": {"type": "lora", "r": RANK},
            "objective": "sft",
            "optim": "adamw",
            "lr_scheduler": "constant",
            "strategy": "single",
            "train": {"max_steps": 1, "bf16": False},
        }
        self.recipe = recipe = parse(Recipe, tree)
        model = build_model(recipe)
        recipe.adapt.remove(model, "default")
        self.vocabulary: int = LLAMA["vocab_size"]
        self.engines = []
        for number in range(count):
            name = f"m{number}"
            recipe.adapt.apply(model, number, name)
            mine = recipe.adapt.parameters(model, name)
            optimizers = build_optimizers(recipe, mine)
            policy = Policy(model)
            self.engines.append(
                FirstOrder(
                    policy,
                    recipe.objective,
                    recipe.strategy,
                    mine,
                    optimizers,
                    max_grad_norm=1.0,
                    adapter=name,
                )
            )

    def works(self, tokens: int) -> list[Any]:
        """A step's work of each member: one document of so many tokens, all of them targets."""
        import numpy as np

        from ftray.data.batch import collate
        from ftray.optim.first_order import Work

        found = []
        for number, engine in enumerate(self.engines):
            ids = np.random.default_rng(number).integers(0, self.vocabulary, tokens)
            labels = ids.copy()
            labels[0] = -100
            row = (ids, labels, (labels >= 0).astype(np.float32), np.array([tokens]), np.array([1]))
            found.append(Work(engine, [collate([row], [0])], 1.0, str(number)))  # type: ignore[list-item]
        return found

    def together(self, tokens: int, most_rows: int | None = None) -> float:
        """CPU seconds of a step of all members, together, with at most so many rows in a pass."""
        from ftray.optim.first_order import step_together

        works, before = self.works(tokens), time.process_time()
        step_together(works, most_rows)
        return time.process_time() - before

    def in_turn(self, tokens: int) -> float:
        """CPU seconds of a step of all members, one after the other."""
        from ftray.optim.first_order import step_together

        works, before = self.works(tokens), time.process_time()
        for work in works:
            step_together([work])
        return time.process_time() - before


def ratio(group: Group, tokens: int, rounds: int) -> dict[str, float]:
    """Throughput together over throughput in turn, and the absolute numbers."""
    for _ in range(_SETTLING):
        group.together(tokens)
        group.in_turn(tokens)
    pairs = [(group.together(tokens), group.in_turn(tokens)) for _ in range(rounds)]
    ratios = sorted(turn / together for together, turn in pairs)
    total = tokens * len(group.engines)
    return {
        "ratio": round(statistics.median(ratios), 3),
        "lowest": round(ratios[0], 3),
        "highest": round(ratios[-1], 3),
        "tokens_per_cpu_s": round(total / statistics.median(together for together, _ in pairs), 1),
        "solo_tokens_per_cpu_s": round(total / statistics.median(turn for _, turn in pairs), 1),
        "rounds": rounds,
    }


def exploit(group: Group, rounds: int) -> dict[str, float]:
    """Milliseconds to copy a member in memory, and by a checkpoint."""
    from ftray.train.checkpoint import Checkpoints, State
    from ftray.train.resident import Resident

    group.together(TOKENS[0])
    donor, heir = group.engines[:2]
    identity = dict.fromkeys(("structure", "data"), "same")
    strategy, memory, files = group.recipe.strategy, [], []
    for number in range(rounds):
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            start = time.perf_counter()
            held = Resident(Path(folder), donor.parameters, donor.optimizers, State(), identity)
            held.copy_to(heir.parameters, heir.optimizers, identity)
            memory.append(time.perf_counter() - start)
            start = time.perf_counter()
            checkpoints = Checkpoints(Path(folder), identity, 1, "life")
            state = State(step=number + 1)
            checkpoints.commit(
                state, strategy.snapshot(donor.parameters, donor.optimizers, copy=False), 1, wait=True
            )
            checkpoints.restore(
                checkpoints.path(number + 1), strategy, heir.parameters, heir.optimizers, same_run=False
            )
            files.append(time.perf_counter() - start)
    return {
        "exploit_ms": round(statistics.median(memory) * 1e3, 2),
        "exploit_checkpoint_ms": round(statistics.median(files) * 1e3, 2),
    }


def _hold(connection: Connection, count: int, tokens: int, most_rows: int | None) -> None:
    """Body of a measured process: import, be looked at, train, be looked at."""
    import ftray.train.population
    import ftray.train.resident  # noqa: F401

    connection.send("imported")
    connection.recv()
    group = Group(count)
    for _ in range(_SETTLING + 1):
        group.together(tokens, most_rows)
    gc.collect()
    connection.send("trained")
    connection.recv()


def held_bytes(processes: int, members: int, tokens: int, most_rows: int | None = None) -> int:
    """Memory over their imports of processes that each train so many members."""
    context = multiprocessing.get_context("spawn")
    pipes, started = [], []
    for _ in range(processes):
        mine, theirs = context.Pipe()
        started.append(context.Process(target=_hold, args=(theirs, members, tokens, most_rows)))
        started[-1].start()
        pipes.append(mine)
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


def memory(tokens: int) -> dict[str, float]:
    """One process with all members, and as many processes with one each."""
    one, many = held_bytes(1, MEMBERS, tokens), held_bytes(MEMBERS, 1, tokens)
    in_turn = held_bytes(1, MEMBERS, tokens, most_rows=1)
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
    found: dict[str, Any] = {f"population_memory_ratio_k8_{tokens}": memory(tokens) for tokens in TOKENS}
    return found | {"population_memory_formula": _FORMULA}


def measure_speed(rounds: int) -> dict[str, Any]:
    """Throughput of both ways, at each number of tokens, and exploits."""
    group = Group(MEMBERS)
    found: dict[str, Any] = {
        f"population_ratio_k8_{tokens}": ratio(group, tokens, rounds) for tokens in TOKENS
    }
    return found | exploit(group, rounds)


def measure(rounds: int = 9) -> dict[str, Any]:
    """All figures."""
    return measure_memory() | measure_speed(rounds)


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=["speed", "memory"])
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    arguments = parser.parse_args()
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    found: dict[str, Any] = {"benchmark": "population", "machine": machine}
    if arguments.only != "speed":
        found |= measure_memory()
    if arguments.only != "memory":
        found |= measure_speed(arguments.rounds)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

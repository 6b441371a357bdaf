"""What members that share one base take, against as many that have one each.

    python -m benchmarks.population --json

`population_ratio_k8`: tokens per CPU-second of 8 members stepped together over those of the same 8 one by one,
whole optimiser steps of the same engines, interleaved, by the median of the rounds.
`population_memory_ratio_k8`: proportional set size over what the imports take, of one process with 8 members over
that of 8 processes with a run each: at the end of a second round of steps, in which each goes on from another.
`exploit_ms`: a member's weights and moments copied in memory, against committed to a checkpoint and read back.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.population_memory import MEMBERS, RANK, TOKENS, measure_memory

_SETTLING = 2
"""Steps before time is taken."""


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

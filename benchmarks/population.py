"""What members that share one base take, against as many that have one each.

    python -m benchmarks.population --json

`population_ratio_k8`: tokens per CPU-second of 8 members trained by `Population.train` over those of a run of
`train`, which is also that of 8 such runs one after the other: whole runs on real text, their steps counted from
the third to the last, interleaved, by the median of the rounds.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.population_memory import MEMBERS, TOKENS, measure_memory, member_recipe
from ftray.train.io import LocalIO, Record

_SETTLING = 2
"""Steps of a run before time is taken."""
_COUNTED_TOKENS = (640, 1536)
"""About so many of a member are then counted in a round, for each of `TOKENS`; of a run alone as many as of all."""


class Timed(LocalIO):
    """Takes the CPU time from a step on until the last one is done, and counts their tokens.

    Args:
        run_dir: the run's folder.
        last: the run's last step.
    """

    def __init__(self, run_dir: Path, last: int) -> None:
        super().__init__(run_dir)
        self._last, self._begun_s = last, 0.0
        self.cpu_s, self.tokens = 0.0, 0

    def beat(self, step: int, phase: str = "step") -> None:
        """The first of a population hears of all."""
        super().beat(step, phase)
        if step == _SETTLING and not self._begun_s:
            self._begun_s = time.process_time()
        if phase == "checkpoint" and not self.cpu_s:
            self.cpu_s = time.process_time() - self._begun_s

    def log(self, record: Record) -> None:
        """Each of its own."""
        super().log(record)
        if record["step"] in (_SETTLING, self._last) and "tokens" in record:
            self.tokens = record["tokens"] - self.tokens


class Speed:
    """Runs in this process, of a Llama of 25M parameters.

    Args:
        folder: base, texts and rows; prepared when needed.
        tokens: of a member's step.
    """

    def __init__(self, folder: Path, tokens: int) -> None:
        from ftray.train.population import Population

        self._folder, self._tokens, self._number = folder, tokens, 0
        self._counted = _COUNTED_TOKENS[TOKENS.index(tokens)] // tokens
        self._population = Population(member_recipe(folder, tokens, 0))

    def together(self) -> float:
        """Tokens per CPU-second of all members."""
        from ftray.train.population import Part

        places = self._places(MEMBERS, _SETTLING + self._counted)
        recipes = [member_recipe(self._folder, self._tokens, number) for number in range(MEMBERS)]
        parts = [
            Part(recipe, io, stop_at=_SETTLING + self._counted)
            for recipe, io in zip(recipes, places, strict=True)
        ]
        self._population.train(parts)
        return sum(io.tokens for io in places) / places[0].cpu_s

    def alone(self) -> float:
        """Tokens per CPU-second of a run, of as many steps as all members have."""
        from ftray.train.worker import train

        last = _SETTLING + MEMBERS * self._counted
        io = self._places(1, last)[0]
        recipe = member_recipe(self._folder, self._tokens, 0, max_steps=last + 1)
        train(recipe, io, stop_at=last)
        return io.tokens / io.cpu_s

    def _places(self, count: int, last: int) -> list[Timed]:
        self._number += 1
        runs = self._folder / "runs" / f"{self._tokens}-{self._number}"
        return [Timed(runs / str(number), last) for number in range(count)]


def ratio(folder: Path, tokens: int, rounds: int) -> dict[str, float]:
    """Throughput together over throughput in turn, and the absolute numbers."""
    speed = Speed(folder, tokens)
    pairs = [(speed.together(), speed.alone()) for _ in range(rounds)]
    ratios = sorted(together / alone for together, alone in pairs)
    return {
        "ratio": round(statistics.median(ratios), 3),
        "lowest": round(ratios[0], 3),
        "highest": round(ratios[-1], 3),
        "tokens_per_cpu_s": round(statistics.median(together for together, _ in pairs), 1),
        "solo_tokens_per_cpu_s": round(statistics.median(alone for _, alone in pairs), 1),
        "rounds": rounds,
    }


def exploit(folder: Path, rounds: int) -> dict[str, float]:
    """Milliseconds to copy a member in memory, and by a checkpoint."""
    from ftray.train.checkpoint import Checkpoints, State
    from ftray.train.resident import Resident
    from ftray.train.worker import begin, one_step

    places = [LocalIO(folder / "runs" / f"exploit-{number}") for number in range(2)]
    runs = [begin(member_recipe(folder, TOKENS[0], n), io, None) for n, io in enumerate(places)]
    for run in runs:
        one_step(run, 0.0)  # so that there are moments
    donor, heir = (run.engine for run in runs)
    identity = dict.fromkeys(("structure", "data"), "same")
    strategy, memory, files = runs[0].recipe.strategy, [], []
    for number in range(rounds):
        with tempfile.TemporaryDirectory(dir=folder) as name:
            start = time.perf_counter()
            held = Resident(Path(name), donor.parameters, donor.optimizers, State(), identity)
            held.copy_to(heir.parameters, heir.optimizers, identity)
            memory.append(time.perf_counter() - start)
            start = time.perf_counter()
            checkpoints = Checkpoints(Path(name), identity, 1, "life")
            snapshot = strategy.snapshot(donor.parameters, donor.optimizers, copy=False)
            checkpoints.commit(State(step=number + 1), snapshot, 1, wait=True)
            path = checkpoints.path(number + 1)
            checkpoints.restore(path, strategy, heir.parameters, heir.optimizers, same_run=False)
            files.append(time.perf_counter() - start)
    for io in places:
        io.close()
    return {
        "exploit_ms": round(statistics.median(memory) * 1e3, 2),
        "exploit_checkpoint_ms": round(statistics.median(files) * 1e3, 2),
    }


def measure_speed(rounds: int, lengths: Sequence[int] = TOKENS) -> dict[str, Any]:
    """Throughput of both ways, at each number of tokens, and exploits."""
    import torch

    from benchmarks.train.setup import prepare_folder

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        prepare_folder(Path(name))
        for tokens in lengths:
            found[f"population_ratio_k8_{tokens}"] = ratio(Path(name), tokens, rounds)
        return found | exploit(Path(name), 9)


def measure(rounds: int = 5) -> dict[str, Any]:
    """All figures."""
    return measure_memory() | measure_speed(rounds)


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["speed", "memory"])
    parser.add_argument(
        "--tokens", type=int, choices=TOKENS, nargs="+", default=TOKENS, help="of a member's step"
    )
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    arguments = parser.parse_args()
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    found: dict[str, Any] = {"benchmark": "population", "machine": machine}
    if arguments.only != "speed":
        found |= measure_memory(arguments.tokens)
    if arguments.only != "memory":
        found |= measure_speed(arguments.rounds, arguments.tokens)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

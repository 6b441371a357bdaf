"""`python -m benchmarks.chaos --train`: runs of two workers that are killed in every way, and what became of them.

Each run is the real command (`ftray run`) on a cluster of its own. At a random step one of its processes is killed
or stopped; the command is given again with `--resume` until it succeeds. Then every optimiser step's rows and
loss are compared with those of a run nobody disturbed.

A campaign lives in its folder. Given the same folder again it goes on with the next run, whatever ended the command
before: what is drawn for a run depends on the seed and the run's number alone.
"""

import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks import recorded
from benchmarks.chaos_log import go_on
from benchmarks.chaos_outcome import Outcome, summary
from ftray.config.load import write_resolved
from ftray.config.recipe import Recipe
from ftray.core.errors import FtrayError
from ftray.core.fs import read_json
from ftray.core.spec import parse
from ftray.train.checkpoint import read_manifest
from ftray.train.track.jsonl import read_records

STEPS, SAVE_STEPS, BATCH = 80, 6, 4
KINDS = ("worker", "driver", "raylet", "controller", "hang", "sigterm_driver", "sigterm_worker")
_ATTEMPTS = 4
_WAIT_S = 180.0
_FIND_S = 5.0


class Campaign:
    """Runs in one folder, each disturbed once.

    Args:
        folder: where everything lies.
        seed: decides kinds and steps.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        from ftray.testing.tiny import tiny_base

        self.folder, self.seed = folder, seed
        self.draw = random.Random(seed)
        self.base = tiny_base(folder / "base")
        rows = [
            {"prompt": f"{n:03d} {n % 7}\n# Answer:", "completion": f" {'abc'[n % 3]}"} for n in range(96)
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.losses: dict[int, float] = {}
        self.rows: dict[int, list[int]] = {}
        self.children: list[subprocess.Popen[bytes]] = []
        """Commands started for the run at hand."""

    def reference(self) -> None:
        """The run nobody disturbs; an earlier command's is taken."""
        if not (self.folder / "runs" / "reference" / "result.json").is_file():
            self.clear("reference")
            if self.start(self.recipe("reference")).wait(_WAIT_S) != 0:
                raise RuntimeError("the reference run failed")
        self.losses, self.rows = self.curve("reference"), self.steps("reference")

    def clear(self, name: str) -> None:
        """Remove what a command that was ended in the middle left of a run."""
        shutil.rmtree(self.folder / "runs" / name, ignore_errors=True)
        for path in (self.folder / "ids").glob(f"{name}.*"):
            path.unlink()

    def disturbed(self, number: int, kind: str) -> Outcome:
        """One run, disturbed once, resumed until it is done; what goes wrong with it is in its notes."""
        recipe = self.recipe(f"{number:03d}-{kind.replace('_', '-')}")
        self.clear(recipe.name)
        self.draw = random.Random(f"{self.seed}-{number}")
        outcome = Outcome(kind, self.draw.randrange(SAVE_STEPS, STEPS // 3))
        started = time.monotonic()
        try:
            self.drive(recipe, outcome)
            self.judge(recipe.name, outcome)
        except Exception as error:  # one run's error is its outcome, not the campaign's end
            outcome.notes.append(f"{type(error).__name__}: {error}")
            outcome.finished = False
        outcome.wall_s = time.monotonic() - started
        return outcome

    def drive(self, recipe: Recipe, outcome: Outcome) -> None:
        """Start it, disturb it once, resume it until it succeeds."""
        process = self.start(recipe)
        try:
            self.resume(recipe, outcome, process)
        finally:
            for child in self.children:
                if child.poll() is None:
                    end(child)
            self.children.clear()

    def resume(self, recipe: Recipe, outcome: Outcome, process: subprocess.Popen[bytes]) -> None:
        """The attempts of one run, the first of which is under way."""
        for outcome.attempts in range(1, _ATTEMPTS + 1):
            if not outcome.disturbed:
                if self.wait_for(recipe.name, outcome.at_step, process):
                    outcome.disturbed = self.disturb(outcome.kind, recipe.name, process)
                if not outcome.disturbed:
                    outcome.notes.append(f"attempt {outcome.attempts} was not disturbed")
            try:
                code = process.wait(_WAIT_S)
            except subprocess.TimeoutExpired:
                outcome.notes.append("did not end")
                end(process)
                code = -1
            outcome.corrupt += self.corrupt(recipe.name)
            if code == 0:
                outcome.finished = True
                return
            if outcome.attempts < _ATTEMPTS:
                process = self.start(recipe, "--resume")

    def judge(self, name: str, outcome: Outcome) -> None:
        """Compare with the reference."""
        rows = self.steps(name)
        for step, expected in self.rows.items():
            seen, wanted = collections.Counter(rows.get(step, [])), collections.Counter(expected)
            outcome.missing += (wanted - seen).total()
            outcome.repeated += (seen - wanted).total()
        outcome.losses_equal = self.curve(name) == self.losses
        outcome.lost_steps = recorded.lost_work(recorded.read(self.folder / "ids" / name))

    def recipe(self, name: str) -> Recipe:
        """A run of two workers; long, since its processes outlive a killed raylet by some seconds."""
        ids = self.folder / "ids" / name
        ids.parent.mkdir(exist_ok=True)
        return parse(
            Recipe,
            {
                "name": name,
                "output_dir": str(self.folder / "runs"),
                "model": {"model_name_or_path": str(self.base)},
                "data": {
                    "train": str(self.folder / "rows.jsonl"),
                    "max_length": 64,
                    "packing": False,
                    "cache_dir": str(self.folder / "cache"),
                },
                "adapt": {"type": "lora", "r": 4},
                "objective": {"type": "benchmarks.recorded:Objective", "pause_s": 0.2},
                "optim": {"type": "benchmarks.recorded:Optimizer", "learning_rate": 1e-2, "path": str(ids)},
                "lr_scheduler": "linear",
                "strategy": {"type": "ddp", "num_workers": 2, "cpus_per_worker": 0.5},
                "train": {
                    "max_steps": STEPS,
                    "global_batch_size": BATCH,
                    "per_device_train_batch_size": 2,
                    "save_steps": SAVE_STEPS,
                    "bf16": False,
                    "watchdog_s": 4.0,
                    "watchdog_slow_s": 20.0,
                },
            },
        )

    def start(self, recipe: Recipe, *flags: str) -> subprocess.Popen[bytes]:
        """`ftray run`, its output in a file."""
        file = self.folder / f"{recipe.name}.yaml"
        write_resolved(recipe, file)
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "ftray.cli.main", "run", str(file), *flags]
        with (self.folder / f"{recipe.name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=environment, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        self.children.append(process)
        return process

    def wait_for(self, name: str, step: int, process: subprocess.Popen[bytes]) -> bool:
        """True when the run has come to a step, False if it ended before."""
        deadline = time.monotonic() + _WAIT_S
        while max(self.curve(name), default=0) < step:
            if process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def disturb(self, kind: str, name: str, process: subprocess.Popen[bytes]) -> bool:
        """Do what the kind says; False if there was nobody left to do it to."""
        time.sleep(self.draw.random() * 0.5)  # anywhere in a step or a commit
        if kind.endswith("driver"):
            pid = process.pid
        elif kind in ("raylet", "controller"):
            found = self.find(process, "raylet/raylet" if kind == "raylet" else "TrainController")
            if found is None:
                return False
            pid = found
        else:
            progress = self.folder / "runs" / name / "progress" / f"rank-{self.draw.randrange(2)}.json"
            pid = read_json(progress)["pid"]
        number = signal.SIGKILL
        if kind == "hang":
            number = signal.SIGSTOP
        elif kind.startswith("sigterm"):
            number = signal.SIGTERM
        if process.poll() is not None:
            return False
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        return True

    def find(self, process: subprocess.Popen[bytes], word: str) -> int | None:
        """The descendant of a run whose command line begins with a word; it may come a little later."""
        deadline = time.monotonic() + _FIND_S
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        if word in (child.cmdline() or [""])[0]:
                            return child.pid
            time.sleep(0.1)
        return None

    def curve(self, name: str) -> dict[int, float]:
        """Loss by step."""
        records = read_records(self.folder / "runs" / name / "metrics.jsonl")
        return {record["step"]: record["loss"] for record in records if "grad_norm" in record}

    def steps(self, name: str) -> dict[int, list[int]]:
        """Rows by optimiser step."""
        return recorded.rows_by_step(recorded.read(self.folder / "ids" / name))

    def corrupt(self, name: str) -> int:
        """Committed checkpoints that are not whole."""
        found = 0
        checkpoints = self.folder / "runs" / name / "checkpoints"
        for path in checkpoints.glob("step-*"):
            try:
                read_manifest(path)
            except FtrayError:
                found += 1
        return found + len(list(checkpoints.glob("damaged-*")))


def end(process: subprocess.Popen[bytes]) -> None:
    """End a run and everything it started."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    process.kill()
    process.wait()


def campaign(folder: Path, minutes: float, seed: int, kinds: Sequence[str], quiet: bool) -> dict[str, Any]:
    """Disturb runs, one at least, until the time is over; the summary of all that were in this folder.

    What goes wrong with the campaign itself is its `error`.
    """
    runs = Campaign(folder, seed)
    outcomes, spent, problem = go_on(
        folder,
        minutes,
        Outcome,
        runs.reference,
        lambda number: runs.disturbed(number, kinds[number % len(kinds)]),
        quiet,
    )
    return summary(outcomes, spent, seed) | {
        "checkpoint_interval_steps": SAVE_STEPS,
        "optimiser_steps_per_run": STEPS,
        "error": problem,
    }

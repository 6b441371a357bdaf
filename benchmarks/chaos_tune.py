"""`python -m benchmarks.chaos --tune`: searches whose processes are killed, and what became of them.

Each search is the real command (`ftray tune`) on a cluster of its own, one of `benchmarks.chaos_search`. After a
random number of records of its journal, or of steps, one of its processes is killed, several times in a row; the
command is given again with `--resume` until it succeeds. The outcome is compared with that of a search nobody
disturbed; the campaign fails if one that was disturbed did not end as that one, lost anything or repeated more than
its kills explain.
"""

import collections
import contextlib
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.chaos_log import go_on
from benchmarks.chaos_search import ARMS, MEMBERS, SEGMENTS, Arm
from ftray.core.errors import FtrayError
from ftray.core.fs import read_json
from ftray.tune.journal import Record, read
from ftray.tune.population import Population, replay

KINDS = ("driver", "trial", "raylet", "driver")
_KILLS = 4
_ATTEMPTS = 8
_WAIT_S = 150.0
_PROCESS_S = 20.0
_STEP_S = 0.3


@dataclass
class Outcome:
    """What became of one disturbed search."""

    arm: str = ""
    """Which search it was (`benchmarks.chaos_search`)."""
    kinds: list[str] = field(default_factory=list)
    """Whom a kill was delivered to; a search that nobody disturbed counts for nothing."""
    finished: bool = False
    attempts: int = 0
    stalls: int = 0
    """Attempts that neither ended nor wrote anything in time."""
    same_lineage: bool = False
    """Members, checkpoints, configurations, scores and lineage are those of the undisturbed search."""
    journal_kept: bool = True
    """No later driver changed what an earlier one had recorded."""
    trials_lost: int = 0
    """Segments of the undisturbed search that were never finished."""
    references_missing: int = 0
    """Checkpoints that something referred to after a kill and that were not there."""
    repeated_steps: int = 0
    """Steps done again, in all after all of its kills."""
    repeatable_per_kill: int = 0
    """Steps that each kill may have done again."""
    wall_s: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def repeatable_steps(self) -> int:
        """Steps that its kills may have done again."""
        return (len(self.kinds) + self.stalls) * self.repeatable_per_kill

    @property
    def is_kept(self) -> bool:
        """True if everything is as if nobody had disturbed it, but for steps that may be repeated."""
        same = self.finished and self.same_lineage and self.journal_kept
        lost = self.trials_lost or self.references_missing
        return same and not lost and self.repeated_steps <= self.repeatable_steps


class Campaign:
    """Searches in one folder, each disturbed several times.

    Args:
        folder: where everything lies.
        seed: decides kinds and moments.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed, self.draw = folder, seed, random.Random(seed)
        self.arms = {arm.name: arm for arm in ARMS}
        self.newest: subprocess.Popen[bytes] | None = None
        """The search that was started last."""
        self.members: dict[str, list[dict[str, Any]]] = {}
        """Of each arm, those of the search that nobody disturbed."""

    def reference(self) -> None:
        """The searches nobody disturbs."""
        for arm in self.arms.values():
            name = f"reference-{arm.name}"
            if sum(record["kind"] == "commit" for record in self.records(name)) < MEMBERS * SEGMENTS:
                process = self.start(arm, name, *["--resume"] * bool(self.records(name)))
                if process.wait(_WAIT_S) != 0:
                    raise RuntimeError(f"{name} failed")
            self.members[arm.name] = state(replay(self.records(name)))

    def disturbed(self, number: int) -> Outcome:
        """One search, disturbed by one kind first and by drawn ones after, resumed until it is done."""
        arm = ARMS[number % len(ARMS)]
        name = f"search-{number:03d}"
        outcome = Outcome(arm=arm.name, repeatable_per_kill=arm.repeatable_per_kill)
        self.draw = random.Random(f"{self.seed}-{number}")
        kinds = [KINDS[number // len(ARMS) % len(KINDS)], *self.draw.choices(KINDS, k=_KILLS - 1)]
        total = len(self.records(f"reference-{arm.name}"))
        started, left = time.monotonic(), list[list[Record]]()
        process = self.start(arm, name)
        for outcome.attempts in range(1, _ATTEMPTS + 1):
            # Until the driver is dead: it goes on after the end of a trial.
            while kinds and self.wait_for(arm, name, total, process):
                self.disturb(kinds.pop(0), process, outcome)
            try:
                code = process.wait(_WAIT_S)
            except subprocess.TimeoutExpired:
                outcome.stalls += 1
                end(process)
                code = -1
            outcome.references_missing += self.missing(arm, name)
            left.append(self.records(name))
            if code == 0:
                outcome.finished = True
                break
            end(process)
            process = self.start(arm, name, "--resume")
        end(process)
        outcome.wall_s = round(time.monotonic() - started, 1)
        self.judge(arm, name, outcome, left)
        return outcome

    def judge(self, arm: Arm, name: str, outcome: Outcome, left: list[list[Record]]) -> None:
        """Compare with the reference, and with what each driver left."""
        records = self.records(name)
        outcome.journal_kept = all(records[: len(earlier)] == earlier for earlier in left)
        outcome.same_lineage = state(replay(records)) == self.members[arm.name]
        ended = (r for r in records if r["kind"] == "commit" or (r["kind"] == "fail" and r["final"]))
        done = {(r["member"], r["segment"]) for r in ended}
        expected = {(m, s) for m in range(MEMBERS) for s in range(SEGMENTS)}
        outcome.trials_lost = len(expected - done)
        outcome.repeated_steps = arm.num_steps(self.folder / name) - MEMBERS * SEGMENTS * arm.steps

    def start(self, arm: Arm, name: str, *flags: str) -> subprocess.Popen[bytes]:
        """`ftray tune`, its output in a file."""
        home = self.folder / name
        home.mkdir(exist_ok=True)
        (home / "recipe.yaml").write_text(yaml.safe_dump(arm.recipe(self.folder, home)))
        where = {"name": "search", "output_dir": str(home), "recipe": str(home / "recipe.yaml")}
        (home / "tune.yaml").write_text(yaml.safe_dump(where | arm.settings))
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "ftray.cli.main", "tune", str(home / "tune.yaml"), *flags]
        with (home / "log").open("ab") as log:
            self.newest = subprocess.Popen(
                command, env=environment, cwd=home, stdout=log, stderr=log, start_new_session=True
            )
        return self.newest

    def wait_for(self, arm: Arm, name: str, total: int, process: subprocess.Popen[bytes]) -> bool:
        """True some time after more records of the journal (`total`: of all), or in the middle of further steps.

        False if the search ended before.
        """
        in_steps = self.draw.random() < 0.5
        more = self.draw.randrange(1, 2 * arm.steps if in_steps else max(2, total // (_KILLS + 1)))

        def count() -> int:
            return arm.num_steps(self.folder / name) if in_steps else len(self.records(name))

        deadline, enough = time.monotonic() + _WAIT_S, count() + more
        while count() < enough:
            if process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        time.sleep(self.draw.random() * (_STEP_S if in_steps else arm.delay_s))
        return True

    def disturb(self, kind: str, process: subprocess.Popen[bytes], outcome: Outcome) -> None:
        """Kill one process of a search, anywhere in a segment or a commit."""
        deadline = time.monotonic() + _PROCESS_S
        found = [process.pid] if kind == "driver" else []
        while not found and process.poll() is None and time.monotonic() < deadline:
            found = list(self.pids(kind, process))  # the first trial may not have started
        if not found:
            outcome.notes.append(f"no {kind} to kill")
            return
        try:
            os.kill(self.draw.choice(found), signal.SIGKILL)
            outcome.kinds.append(kind)
        except ProcessLookupError:
            outcome.notes.append(f"the {kind} had ended")

    def pids(self, kind: str, process: subprocess.Popen[bytes]) -> Iterator[int]:
        """The processes of one kind below a search."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    command = (child.cmdline() or [""])[0]
                    is_trial = command.startswith("ray::") and not command.startswith("ray::IDLE")
                    if ("raylet/raylet" in command) if kind == "raylet" else is_trial:
                        yield child.pid

    def records(self, name: str) -> list[Record]:
        """The journal as it stands."""
        try:
            return read(self.folder / name / "search" / "journal.jsonl")
        except FtrayError:
            return []

    def missing(self, arm: Arm, name: str) -> int:
        """Checkpoints that members go on from and that are not there."""
        segments = self.folder / name / "search" / "segments"
        found = 0
        for member in replay(self.records(name)).alive:
            if member.checkpoint is not None:
                result = read_json(segments / member.checkpoint / "segment.json")
                found += not (segments / member.checkpoint / result["checkpoint"] / arm.state_file).is_file()
        return found


def state(population: Population) -> list[dict[str, Any]]:
    """What must not depend on kills."""
    keys = ("index", "config", "segment", "checkpoint", "score", "alive", "lineage")
    return [{key: getattr(member, key) for key in keys} for member in population.members]


def end(process: subprocess.Popen[bytes]) -> None:
    """End a search and what it left of its cluster: its session of processes."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def summary(outcomes: list[Outcome], minutes: float, seed: int) -> dict[str, Any]:
    """The line that is printed last; only kills that were delivered count."""
    disturbed = [outcome for outcome in outcomes if outcome.kinds]
    return {
        "benchmark": "chaos-tune",
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "minutes": minutes,
        "seed": seed,
        "searches": len(outcomes),
        "searches_disturbed": len(disturbed),
        "searches_finished": sum(outcome.finished for outcome in disturbed),
        "kills": dict(collections.Counter(kind for outcome in outcomes for kind in outcome.kinds)),
        "kills_of": {
            arm.name: sum(len(outcome.kinds) for outcome in outcomes if outcome.arm == arm.name)
            for arm in ARMS
        },
        "lineage_as_undisturbed": sum(outcome.same_lineage for outcome in disturbed),
        "journals_kept": sum(outcome.journal_kept for outcome in disturbed),
        "trials_lost": sum(outcome.trials_lost for outcome in outcomes),
        "referenced_checkpoints_missing": sum(outcome.references_missing for outcome in outcomes),
        "stalls": sum(outcome.stalls for outcome in outcomes),
        "repeated_steps": sum(outcome.repeated_steps for outcome in disturbed),
        "repeatable_steps": sum(outcome.repeatable_steps for outcome in disturbed),
        "promises_broken": sum(not outcome.is_kept for outcome in disturbed),
        "outcomes": [vars(outcome) for outcome in outcomes],
    }


def campaign(folder: Path, minutes: float, seed: int, quiet: bool) -> dict[str, Any]:
    """Disturb searches, one at least, until the time is over; the summary of all that were in this folder.

    What goes wrong with the campaign itself is its `error`.
    """
    searches = Campaign(folder, seed)
    try:
        outcomes, spent, problem = go_on(
            folder, minutes, Outcome, searches.reference, searches.disturbed, quiet
        )
    finally:
        if searches.newest is not None:  # also when the campaign is told to end
            end(searches.newest)
    return summary(outcomes, spent, seed) | {"error": problem}

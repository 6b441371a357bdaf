"""A process that does nothing any more is found, says where it stands, and is ended."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ftray.core.errors import TrainError
from ftray.core.fs import read_json
from ftray.train.io import LocalIO
from ftray.train.watchdog import Watchdog, forget, hung
from ftray.train.worker import train
from tests.recipes import MakeRecipe

# Each kind: what the process does for ever after its third step.
KINDS = {
    "waits in another thread": """
done = threading.Event()
def work():
    for step in range(3):
        dog.beat(step)
        time.sleep(0.05)
    dog.beat(3, "update")
    time.sleep(1000)
dog = None
def main():
    global dog
    dog = Watchdog(folder, 0, 0.5, 0.5)
    work()
thread = threading.Thread(target=main)
thread.start()
thread.join()
""",
    "holds the interpreter's lock": """
dog = Watchdog(folder, 0, 0.5, 0.5)
dog.beat(3, "update")
sum(range(10**14))
""",
    "is stopped": """
dog = Watchdog(folder, 0, 0.5, 0.5)
dog.beat(3, "update")
os.kill(os.getpid(), signal.SIGSTOP)
sum(range(10**14))
""",
    "is one of many threads": """
def trains():
    dog = Watchdog(folder, 0, 0.5, 0.5)
    for _ in range(120):
        threading.Thread(target=never.wait, daemon=True).start()
    dog.beat(3, "update")
    sum(range(10**14))
def waits_for_it():
    thread.join()
never = threading.Event()
thread = threading.Thread(target=trains)
thread.start()
waits_for_it()
""",
}
WAITED_FOR = "holds the interpreter's lock"
HEAD = """
import os, signal, sys, threading, time
from pathlib import Path
from ftray.train.watchdog import Watchdog
folder = Path(sys.argv[1])
"""


def test_hung_processes_leave_their_stacks_and_are_ended(tmp_path: Path) -> None:
    """All kinds of hanging, each a run of its own, and a rank that waits, far from its own limit."""
    dogs: list[Watchdog] = []
    # Made by another thread, as in a worker, it only writes the stacks of this process.
    thread = threading.Thread(target=lambda: dogs.append(Watchdog(tmp_path / WAITED_FOR, 1, 1e3, 1e3)))
    thread.start(), thread.join()
    dogs[0].beat(3)
    started = time.monotonic()
    processes = {
        kind: subprocess.Popen(
            [sys.executable, "-c", HEAD + code, str(tmp_path / kind)], stderr=subprocess.PIPE, text=True
        )
        for kind, code in KINDS.items()
    }
    for kind, process in processes.items():
        _, stderr = process.communicate(timeout=60)
        assert time.monotonic() - started < 30
        check(tmp_path / kind, kind, process, stderr)
    stacks = tmp_path / WAITED_FOR / "stacks" / f"rank-1-{os.getpid()}.txt"
    assert "test_hung_processes_leave" in stacks.read_text()
    dogs[0].close()


def check(folder: Path, kind: str, process: subprocess.Popen[str], stderr: str) -> None:
    what = "rank 0 made no progress in update at step 3 for 1 s (allowed: 0.5 s)"
    if kind == "is stopped":  # continued for its stacks, it can say itself what happened
        assert process.returncode == 1 and f"TrainError: {what}" in stderr
    else:
        assert process.returncode == -signal.SIGKILL and stderr.startswith(f"error: {what}; stacks: ")
    [stacks] = (folder / "stacks").glob("rank-0-*.txt")
    assert "hread 0x" in stacks.read_text() and 'File "<string>"' in stacks.read_text()
    if kind == "is one of many threads":  # more than are written of all
        newest, _, rest = stacks.read_text().partition("main thread (")
        main, _, trains = rest.partition("thread that trains (")
        assert "in waits_for_it" in main and "in trains" in trains
        assert "in trains" not in newest and newest.count("in wait") >= 99
    report = hung(folder)
    assert report is not None and "raise `train.watchdog_s`" in report
    progress = read_json(folder / "progress" / "rank-0.json")
    assert (progress["step"], progress["phase"], progress["pid"]) == (3, "update", process.pid)
    forget(folder)
    assert hung(folder) is None


def test_a_live_process_is_left_alone_and_leaves_nothing(tmp_path: Path) -> None:
    dog = Watchdog(tmp_path, 0, 0.6, 5.0)
    for step in range(8):
        dog.beat(step)
        time.sleep(0.2)
    dog.beat(8, "checkpoint")
    time.sleep(1.5)
    dog.beat(8)
    dog.close()
    assert hung(tmp_path) is None and not (tmp_path / "stacks").exists()


def test_a_run_that_hangs_raises_where_it_hangs(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """The main thread of this very process, asleep in its fourth step."""
    recipe = make_recipe(
        train__watchdog_s=1.0,
        train__global_batch_size=2,
        objective={"type": "tests.faults:Faulty", "hang": "sleep", "at": 4},
    )
    started = time.monotonic()
    with pytest.raises(TrainError, match=r"rank 0 made no progress in step 4 .*stacks.*`train\.watchdog_s`"):
        train(recipe, LocalIO(tmp_path / "run"))
    assert time.monotonic() - started < 30
    [stacks] = (tmp_path / "run" / "stacks").glob("rank-0-*.txt")
    assert "faults.py" in stacks.read_text()

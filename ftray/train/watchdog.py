"""Says what a training process is doing, and has it ended when it does nothing for too long.

Each process tells its guard (`ftray.train.guard`) through a pipe and, at most each 0.5 s while the phase stays,
writes `run_dir/progress/rank-<k>.json` (step, phase, time, process) for whoever wants to know. Stacks go to
`run_dir/stacks/`.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import IO, Any, cast

from ftray.core.errors import TrainError
from ftray.core.fs import read_json
from ftray.train import guard

_EVERY_S = 0.5


class Watchdog:
    """The progress of one rank, and its guard.

    The stacks are written by a handler in C, which works while the interpreter's lock is held. In a process whose
    main thread trains, the same signal then raises `TrainError` there, if it can run at all; what cannot, and
    any worker, is ended by SIGKILL.

    Args:
        run_dir: the run's folder.
        rank: this process's rank.
        step_s: seconds a step may take; None: nothing is watched, progress is still written.
        slow_s: seconds a phase that is no step may take: the first step, validation, a checkpoint, the end.
    """

    def __init__(self, run_dir: Path, rank: int, step_s: float | None, slow_s: float) -> None:
        self._step_s, self._slow_s = step_s, slow_s
        self._path = run_dir / "progress" / f"rank-{rank}.json"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._about = {"rank": rank, "pid": os.getpid(), "host": socket.gethostname()}
        self._last, self._last_phase = 0.0, ""
        self._guard: subprocess.Popen[bytes] | None = None
        self._file: IO[str] | None = None
        self._raises, self._before = False, cast(Any, None)
        if step_s is not None:
            self._start(run_dir / "stacks", rank)

    def beat(self, step: int, phase: str = "step") -> None:
        """This process is about to do `phase` after `step` steps."""
        allowed_s = self._step_s if phase == "step" else self._slow_s
        doing = f"step {step + 1}" if phase == "step" else f"{phase} at step {step}"
        if self._guard is not None and self._guard.stdin is not None:
            message = {"doing": doing, "allowed_s": allowed_s, "thread": threading.get_native_id()}
            with contextlib.suppress(OSError):  # a full pipe; a guard that was killed is missed, not needed
                os.write(self._guard.stdin.fileno(), json.dumps(message).encode() + b"\n")
        now = time.monotonic()
        if phase != self._last_phase or now - self._last > _EVERY_S:
            self._last, self._last_phase = now, phase
            self._write({**self._about, "step": step, "phase": phase, "time": time.time()})

    def _write(self, progress: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # a full disk is told by what must be written
            tmp = self._path.with_suffix(".tmp")
            tmp.write_text(json.dumps(progress))
            tmp.replace(self._path)

    def close(self) -> None:
        """End the guard; leave stacks behind only if there are any."""
        if self._guard is not None and self._guard.stdin is not None and self._file is not None:
            self._guard.stdin.close()
            self._guard.kill()
            self._guard.wait()
            self._guard = None
            faulthandler.unregister(guard.ONE_STACK)
            faulthandler.unregister(guard.ALL_STACKS)
            if self._raises:
                signal.signal(guard.ALL_STACKS, self._before)
            self._file.close()
            path = Path(self._file.name)
            with contextlib.suppress(OSError):
                if path.stat().st_size == 0:
                    path.unlink()
                    path.parent.rmdir()  # if nobody else's are there

    def _start(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{rank}-{os.getpid()}.txt"
        self._file = path.open("a")
        if threading.current_thread() is threading.main_thread():
            self._raises, self._before = True, signal.signal(guard.ALL_STACKS, self._hung)
        faulthandler.register(guard.ALL_STACKS, self._file, all_threads=True, chain=self._raises)
        faulthandler.register(guard.ONE_STACK, self._file, all_threads=False)
        command = [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), str(rank), str(path)]
        self._guard = subprocess.Popen(command, stdin=subprocess.PIPE)
        assert self._guard.stdin is not None
        os.set_blocking(self._guard.stdin.fileno(), False)

    def _hung(self, signum: int, frame: FrameType | None) -> None:
        del signum
        if self._file is not None:
            self._file.write("\nmain thread, when Python ran again:\n")
            traceback.print_stack(frame, file=self._file)
            self._file.flush()
        told = hung(self._path.parents[1])
        raise TrainError(told or "a rank of this run hangs")


def hung(run_dir: Path) -> str | None:
    """One line on the ranks that guards found hanging since `forget`; None if there are none."""
    reports = sorted(run_dir.glob("stacks/hung-*.json"))
    if not reports:
        return None
    first = min((read_json(path) for path in reports), key=lambda report: report["time"])
    return (
        f"{first['what']}; the stacks of all threads are in {run_dir / 'stacks'}; "
        "if it only takes longer, raise `train.watchdog_s` (steps) or `train.watchdog_slow_s` (the rest)"
    )


def forget(run_dir: Path) -> None:
    """Remove the reports of an earlier life of a run; the stacks stay."""
    for report in run_dir.glob("stacks/hung-*.json"):
        report.unlink(missing_ok=True)

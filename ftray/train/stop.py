"""What asks a run to end before its time: a signal to this process, or the file `stop` in the run's folder.

The run then ends its step on every rank, commits a checkpoint and goes; `--resume` continues with no step lost.
"""

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

FILE = "stop"
SIGNALS = (signal.SIGTERM, signal.SIGINT)

_LOOK_EVERY_S = 0.5


class Stop:
    """Listens for requests to end early, until it is closed.

    Signals are heard only in a process whose main thread makes this object. A second one of either kind ends
    the process where it stands.

    Args:
        run_dir: where a file `stop` also counts, with its text as the reason; looked for twice a second.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE
        self._reason: str | None = None
        self.signum: int | None = None
        """The signal that asked, if it was one."""
        self._looked = 0.0
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._heard) for number in SIGNALS}

    @property
    def reason(self) -> str | None:
        """Why to end, or None."""
        now = time.monotonic()
        if self._reason is None and now - self._looked >= _LOOK_EVERY_S:
            self._looked = now
            if self._path.is_file():
                self._reason = self._path.read_text().strip() or FILE
        return self._reason

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _heard(self, signum: int, frame: FrameType | None) -> None:
        del frame
        if self._reason is not None:
            raise KeyboardInterrupt
        self._reason, self.signum = signal.Signals(signum).name, signum
        told = f"{self._reason}: this step is ended and a checkpoint written; once more: end now\n"
        os.write(2, told.encode())  # not `print`, which may be what the signal interrupted

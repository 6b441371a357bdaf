"""Follows the records that a run in other processes writes."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_POLL_S = 0.5


class Tail:
    """Calls `on_record` with the newest record of a metrics file whenever it grew, while a block runs."""

    def __init__(self, path: Path, on_record: Callable[[dict[str, Any]], None] | None) -> None:
        self._path, self._on_record = path, on_record
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="ftray-tail", daemon=True)

    def __enter__(self) -> "Tail":
        if self._on_record:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._on_record:
            self._thread.join()

    def _follow(self) -> None:
        # An older life of the run may have left its file; what it holds is no news.
        offset = self._path.stat().st_size if self._path.is_file() else 0
        while not self._stop.wait(_POLL_S):
            if not self._path.is_file():
                continue
            if self._path.stat().st_size < offset:  # a resumed run has written it anew
                offset = 0
            with self._path.open("rb") as file:
                file.seek(offset)
                lines = file.read().split(b"\n")
            offset += sum(len(line) + 1 for line in lines[:-1])
            if len(lines) > 1 and self._on_record:
                self._on_record(json.loads(lines[-2]))

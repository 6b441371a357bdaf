"""Who used what: one JSON line for every request, as it ends."""

import datetime
import json
import os
from pathlib import Path
from typing import Any


class UsageLog:
    """A file a day and front, in a folder that fronts of several machines may share.

    Args:
        folder: where the files are; None: nothing is written.
        front: the front's name, so that no two write to one file.
    """

    def __init__(self, folder: str | None, front: str) -> None:
        self._folder = Path(folder) if folder else None
        self._front = front
        if self._folder:
            self._folder.mkdir(parents=True, exist_ok=True)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record, to which the time is added; a reader sees whole lines only."""
        if self._folder is None:
            return
        now = datetime.datetime.now(datetime.UTC)
        path = self._folder / f"usage-{now:%Y%m%d}-{self._front}.jsonl"
        line = json.dumps({"time": now.isoformat(timespec="milliseconds"), **record}, ensure_ascii=False)
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(fd, f"{line}\n".encode())
        finally:
            os.close(fd)

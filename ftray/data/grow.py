"""Read a data set while it is being prepared, and prepare one while it is being read."""

import threading
import time
from collections.abc import Callable
from typing import Any

from ftray.core import errors
from ftray.core.errors import DataError, FtrayError
from ftray.core.types import Progress, no_progress
from ftray.data.cache import NodeCache
from ftray.data.dataset import READER
from ftray.data.prepare import Preparation, Stopped
from ftray.data.read import MANIFEST, Shards, checked, window_name
from ftray.data.store import Folder
from ftray.data.work import Runner, run_here

_FAILED = "failed.json"
_POLL_S = 0.1


class GrowingShards(Shards):
    """The rows of a data set as far as its windows are committed.

    Args:
        path: the folder or URL of a `Preparation`.
        window_shards: shards in a window, as given to the preparation.
        cache: as in `Shards`.

    Raises:
        FtrayError: from here and from `ensure`, what stopped the preparation.
    """

    def __init__(self, path: Folder, window_shards: int, *, cache: NodeCache | None = None) -> None:
        self._open(path, cache)
        self._window_shards, self._windows = window_shards, 0
        self._told = 0
        self.is_complete = False
        """True once the last row is known."""
        self.manifest = {}
        self.ensure(1)

    def ensure(self, num_rows: int) -> bool:
        """Wait until so many rows are there, or all; True if there are more than before."""
        before = len(self)
        if num_rows > self._told:
            # Now and then is enough: preparation stays whole windows ahead.
            self._store.write_json(f"{self._name}/{READER}", {"rows": num_rows})
            self._told = num_rows + before // max(1, 2 * self._windows)
        while not self.is_complete and len(self) < num_rows:
            if not (self._take_manifest() or self._take_window()):
                self._raise_failure()
                time.sleep(_POLL_S)
        return len(self) > before

    def _take_manifest(self) -> bool:
        manifest = self._read(MANIFEST)
        if manifest is None:
            return False
        known = len(self.shards)
        assert [s["digest"] for s in manifest["shards"][:known]] == [s["digest"] for s in self.shards]
        self.manifest, self.is_complete = manifest, True
        self._add(manifest["shards"][known:])
        return True

    def _take_window(self) -> bool:
        window = self._read(window_name(self._window_shards, self._windows))
        if window is None:
            return False
        self.manifest, self._windows = {**self.manifest, **window}, self._windows + 1
        self._add(window["shards"])
        return True

    def _read(self, name: str) -> dict[str, Any] | None:
        content = self._store.read_json(f"{self._name}/{name}")
        return None if content is None else checked(content, f"{self.path}/{name}")

    def _raise_failure(self) -> None:
        told = self._store.read_json(f"{self._name}/{_FAILED}")
        if told is not None:
            found: FtrayError = getattr(errors, told["type"], DataError)(told["message"])
            raise found


class Background:
    """A preparation in a thread of its own.

    What stops it is told to readers of the data set, and raised again by `close`.

    Args:
        preparation: what is prepared.
        run: does the work on units.
        progress: called from the thread.
    """

    def __init__(
        self, preparation: Preparation, run: Runner = run_here, progress: Progress = no_progress
    ) -> None:
        self._preparation, self._stop = preparation, threading.Event()
        self._error: BaseException | None = None
        self._failed = f"{preparation.dataset.name}/{_FAILED}"
        preparation.store.remove(self._failed)
        if not preparation.dataset.is_whole():
            preparation.dataset.forget()
        work: Callable[[], None] = lambda: self._work(run, progress)  # noqa: E731
        self._thread = threading.Thread(target=work, name="ftray-prepare", daemon=True)
        self._thread.start()

    @property
    def folder(self) -> Folder:
        """Where the data set grows."""
        return self._preparation.folder

    def close(self) -> None:
        """Stop at the next unit; what is made stays. Raises what the preparation raised."""
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _work(self, run: Runner, progress: Progress) -> None:
        try:
            self._preparation.run(run, progress, self._stop.is_set, is_read=True)
        except Stopped:
            pass
        except Exception as error:
            self._error = error
            message = str(error) or type(error).__name__
            told = {"type": type(error).__name__, "message": " ".join(message.split())}
            self._preparation.store.write_json(self._failed, told)

"""One checkpoint on its way to the disk, in a thread beside the training loop."""

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ftray.core.errors import CheckpointError
from ftray.core.fs import digest_file, fsync_path, read_json, write_json
from ftray.strategy.base import Snapshot

MANIFEST = "manifest.json"
_POLL_S = 0.02
RANKS_WAIT_S = 1800.0
"""How long rank 0 waits for the files of the others."""


class Writer(threading.Thread):
    """Writes one rank's part; on rank 0 it also commits the checkpoint.

    Args:
        snapshot: this rank's part.
        final: the checkpoint's folder.
        life: keeps apart what another life of the run writes for the same step.
        manifest: the manifest but for the files.
        committed: called when the checkpoint is there, on rank 0.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        final: Path,
        life: str,
        manifest: Mapping[str, Any],
        committed: Callable[[], None],
    ) -> None:
        # A daemon: a process that must end does not wait for the files of ranks that are gone.
        super().__init__(name=f"checkpoint-{final.name}", daemon=True)
        self._snapshot: Snapshot | None = snapshot
        self._rank, self._num_writers = snapshot.rank, snapshot.num_writers
        self._final, self._folder = final, final.parent / f".tmp-{final.name}-{life}"
        self._manifest, self._committed = dict(manifest), committed
        self._error: Exception | None = None

    def run(self) -> None:
        """Body of the thread."""
        try:
            if self._rank < self._num_writers:
                self._write()
            if self._rank == 0:
                self._commit()
                self._committed()
        except Exception as error:
            self._error = error
            if self._rank == 0:
                shutil.rmtree(self._folder, ignore_errors=True)
        finally:
            self._snapshot = None  # its memory goes now, not with the next checkpoint

    def finish(self) -> None:
        """Wait for the end. Raises `CheckpointError` (one line) for whatever went wrong."""
        self.join()
        if isinstance(self._error, CheckpointError):
            raise self._error
        if self._error is not None:
            reason = " ".join(str(self._error).split()) or type(self._error).__name__
            raise CheckpointError(
                f"{self._final}: the checkpoint cannot be written ({reason}); mend that and use `--resume`"
            ) from self._error

    def _write(self) -> None:
        assert self._snapshot is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        report = self._folder / f"rank-{self._rank}.json"
        try:
            names = self._snapshot.write(self._folder)
            for name in names:
                fsync_path(self._folder / name)
            # Last, and atomic: whoever sees it sees whole files.
            write_json(report, {"files": {name: digest_file(self._folder / name) for name in names}})
        except Exception as error:
            if self._rank != 0:  # so that rank 0 need not wait for the time-out
                with contextlib.suppress(OSError):
                    write_json(report, {"error": f"rank {self._rank}: {error}"})
            raise

    def _commit(self) -> None:
        deadline = time.monotonic() + RANKS_WAIT_S
        files: dict[str, str] = {}
        for rank in range(self._num_writers):
            report = self._folder / f"rank-{rank}.json"
            while not report.exists():
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"{self._final}: rank {rank} has written nothing in {RANKS_WAIT_S:g} s; do all "
                        "workers see the same folder?"
                    )
                time.sleep(_POLL_S)
            told = read_json(report)
            if "error" in told:
                raise CheckpointError(f"{self._final}: the checkpoint cannot be written ({told['error']})")
            files |= told["files"]
        write_json(self._folder / MANIFEST, {**self._manifest, "files": files})
        fsync_path(self._folder)
        self._folder.rename(self._final)
        fsync_path(self._final.parent)

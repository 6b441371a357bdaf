"""What a run reads and writes besides its rows: prepared data, metrics, notices to it and from it.

The loop is the same in a notebook, a test and a Ray Train worker; only its `IO` differs.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO as File
from typing import TYPE_CHECKING, Any, Protocol

from ftray.config.load import write_resolved
from ftray.config.recipe import Recipe
from ftray.core.errors import TrainError
from ftray.core.fs import lock_file, write_json
from ftray.core.types import Progress, no_progress
from ftray.data.store import Folder
from ftray.train.stop import Stop
from ftray.train.track import Sinks
from ftray.train.watchdog import Watchdog, forget

if TYPE_CHECKING:
    from ftray.data.grow import Background

Record = dict[str, Any]

STOPPED = "stopped.json"
"""Written when a run was asked to end early and did: after which step (of each, if there are several), and why."""

_CLAIM_WAIT_S = 30.0


class IO(Protocol):
    """Surroundings of a run."""

    run_dir: Path

    def prepare(self, recipe: Recipe) -> tuple[Folder, Folder | None]:
        """Folders of the prepared training and validation shards."""
        ...

    def claim(self) -> None:
        """Make the run folder this process's own; called on rank 0 before anything in it is read."""
        ...

    def open(self, recipe: Recipe, from_step: int) -> None:
        """Begin writing on rank 0; records after `from_step` of an earlier life are dropped."""
        ...

    def start(self, recipe: Recipe, rank: int) -> None:
        """The first step is next: be watched, and listen for what would end the run early. On every rank."""
        ...

    def beat(self, step: int, phase: str = "step") -> None:
        """This rank is about to do `phase` after `step` steps."""
        ...

    def stop_reason(self) -> str | None:
        """Why this rank is asked to end the run before its time; None: it is not."""
        ...

    @property
    def stop_signal(self) -> int | None:
        """The signal that asked, if it was one."""
        ...

    def stopped(self, steps: Sequence[int], reason: str) -> None:
        """The run, or each of several, ends before its time with a checkpoint of its step; called on rank 0."""
        ...

    def log(self, record: Record) -> None:
        """Write one record of metrics; nothing on ranks that did not `open`."""
        ...

    def committed(self, record: Record) -> None:
        """A checkpoint is durable; `record` holds the last step's metrics. Called on every rank."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


class LocalIO:
    """A run folder on this machine.

    Args:
        run_dir: the run's folder; made when needed.
        on_record: also called with every record, to draw progress.
        on_prepare: progress of the preparation of rows.
    """

    def __init__(
        self,
        run_dir: Path,
        on_record: Callable[[Record], None] | None = None,
        on_prepare: Progress = no_progress,
    ) -> None:
        self.run_dir = Path(run_dir)
        self._on_record, self._on_prepare = on_record, on_prepare
        self._sinks: Sinks | None = None
        self._lock: File[bytes] | None = None
        self._background: Background | None = None
        self._watchdog: Watchdog | None = None
        self._stop: Stop | None = None

    def prepare(self, recipe: Recipe) -> tuple[Folder, Folder | None]:
        """Prepare in this process, or find what is prepared."""
        from ftray.data.grow import Background
        from ftray.data.prepare import Preparation, prepare_local

        validation: Folder | None = None
        if recipe.data.validation:
            validation = prepare_local(recipe.data, recipe.model.tokenizer, "validation", self._on_prepare)
        if recipe.data.stream:
            preparation = Preparation(recipe.data, recipe.model.tokenizer, "train")
            self._background = Background(preparation, progress=self._on_prepare)
            return preparation.folder, validation
        return prepare_local(recipe.data, recipe.model.tokenizer, "train", self._on_prepare), validation

    def claim(self) -> None:
        """Lock the folder; the workers of a killed driver may still hold it for a moment.

        Raises:
            TrainError: if another process goes on training there.
        """
        self._lock = lock_file(self.run_dir / "run.lock", _CLAIM_WAIT_S)
        if self._lock is None:
            raise TrainError(f"{self.run_dir}: another process trains here; stop it, or use another `name`")

    def open(self, recipe: Recipe, from_step: int) -> None:
        """Write the resolved recipe and open the trackers, anew if they were open."""
        if self._sinks is not None:
            self._sinks.close()
        self.run_dir.mkdir(parents=True, exist_ok=True)
        write_resolved(recipe, self.run_dir / "recipe.yaml")
        self._sinks = Sinks(recipe, self.run_dir, from_step)

    def start(self, recipe: Recipe, rank: int) -> None:
        """Start this process's guard, and hear signals if this is its main thread."""
        if rank == 0:
            forget(self.run_dir)
            (self.run_dir / STOPPED).unlink(missing_ok=True)  # of an earlier group that was resized
        limits = recipe.train
        self._stop = Stop(self.run_dir)
        self._watchdog = Watchdog(self.run_dir, rank, limits.watchdog_s, limits.watchdog_slow_s)

    def beat(self, step: int, phase: str = "step") -> None:
        """Tell the guard, and whoever reads `run_dir/progress`."""
        if self._watchdog is not None:
            self._watchdog.beat(step, phase)

    def stop_reason(self) -> str | None:
        """A signal to this process, or a file `stop` in the run's folder."""
        return None if self._stop is None else self._stop.reason

    @property
    def stop_signal(self) -> int | None:
        """The signal that asked, if it was one."""
        return None if self._stop is None else self._stop.signum

    def stopped(self, steps: Sequence[int], reason: str) -> None:
        """Leave word in the run's folder."""
        write_json(self.run_dir / STOPPED, {"steps": list(steps), "reason": reason})

    def log(self, record: Record) -> None:
        """To every tracker."""
        if self._sinks is not None:
            self._sinks.log(record)
            if self._on_record is not None:
                self._on_record(record)

    def committed(self, record: Record) -> None:
        """Nobody else to tell."""

    def close(self) -> None:
        """Close the trackers, let the folder go and end a preparation under way."""
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None
        if self._stop is not None:
            self._stop.close()
            self._stop = None
        if self._sinks is not None:
            self._sinks.close()
            self._sinks = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        if self._background is not None:
            background, self._background = self._background, None
            background.close()

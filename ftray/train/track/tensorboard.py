"""Metrics for TensorBoard: event files in the run folder."""

from pathlib import Path
from typing import Any

from ftray.config.recipe import Recipe
from ftray.core.spec import spec


@spec
class TensorBoard:
    """Scalars under `tensorboard/`."""

    def open(self, recipe: Recipe, run_dir: Path, from_step: int) -> "TensorBoardSink":
        """Open a writer; steps after `from_step` of an earlier life are hidden by TensorBoard itself."""
        del recipe
        return TensorBoardSink(run_dir / "tensorboard", from_step)


class TensorBoardSink:
    """An open event file."""

    def __init__(self, folder: Path, from_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=from_step + 1)

    def log(self, record: dict[str, Any]) -> None:
        """One scalar for every number but the step."""
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                self._writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()

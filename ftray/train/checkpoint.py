"""Checkpoints are transactions: a folder is there with everything its manifest names, or it is not there.

    step-00000100/  trainable-0-of-2.safetensors  trainable-1-of-2.safetensors
                    optimizer-0-of-2.safetensors  optimizer-1-of-2.safetensors
                    rank-0.json  rank-1.json  manifest.json

A step waits for the copy of the state to CPU memory and no longer. Each rank's thread writes its files and, last,
`rank-<k>.json` with their digests; rank 0's thread waits for all of those, writes the manifest and renames the
folder. The ranks meet on the file system only, never in a collective.

The manifest holds the digest of every file, the data cursor (the step), the precision, and digests that say
which run and which structure it belongs to. There is no generator state to save: the seeds of a step are a
function of (seed, step, rank).
"""

import dataclasses
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftray.core.errors import CheckpointError, FtrayError
from ftray.core.fs import read_json, verify_tree
from ftray.strategy.base import Optimizers, Parameters, Snapshot, Strategy
from ftray.train.identity import check_identity
from ftray.train.retention import prune
from ftray.train.transaction import MANIFEST, Writer

FORMAT = 2


@dataclasses.dataclass(frozen=True)
class State:
    """Where a run stands; all that is needed, besides tensors, to go on."""

    step: int = 0
    """Optimiser steps done."""
    position: int = 0
    """Rows taken from the data order: the data cursor, whatever batch sizes took them."""
    tokens: int = 0
    """Tokens seen over all ranks."""
    elapsed_s: float = 0.0
    """Seconds of training so far, over all resumptions."""
    bf16: bool | None = None
    """Precision chosen when the run began; kept when it goes on."""
    loss: float | None = None
    """Loss of the last step."""
    eval_loss: float | None = None
    """Validation loss at this very step, where it was validated."""
    best_eval_loss: float | None = None
    """Lowest validation loss so far."""
    evals_without_gain: int = 0
    """Validations in a row that early stopping counts against its patience."""
    rollbacks: int = 0
    """Times the run went back to a checkpoint because numbers were not finite."""


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        folder: where they lie; made when needed.
        identity: `run_identity` of the run (`ftray.train.identity`).
        keep: how many committed ones stay.
        life: the same word on every rank, another one each time the run is started; what an earlier life may
            still be writing is kept apart by it.
        keep_best: also that of the lowest validation loss stays.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], keep: int, life: str, keep_best: bool = False
    ) -> None:
        self.folder, self.identity, self.keep, self.life = folder, dict(identity), keep, life
        self.keep_best = keep_best
        self.durable: State | None = None
        """State of the newest checkpoint this process knows to be committed; known on rank 0 only."""
        self._last_step: int | None = None
        self._writer: Writer | None = None
        self._writing: State | None = None

    def path(self, step: int) -> Path:
        """Folder of a step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def commit(self, state: State, snapshot: Snapshot, world: int, *, wait: bool = False) -> None:
        """Begin to write one checkpoint; called on every rank.

        At most one is being written: the one before is waited for. A step that was committed last is not
        written again.

        Args:
            state: where the run stands.
            snapshot: this rank's part of the trainable state at that step.
            world: data-parallel ranks, for the manifest.
            wait: return when this rank's part is durable; on rank 0, when the checkpoint is.

        Raises:
            CheckpointError: one line, if this one or the one before could not be written.
        """
        self.finish()
        if state.step != self._last_step:
            self._last_step, self._writing = state.step, state
            manifest = {
                "format": FORMAT,
                "layout": snapshot.layout,
                "state": dataclasses.asdict(state),
                "identity": self.identity,
                "world": world,
            }
            self._writer = Writer(snapshot, self.path(state.step), self.life, manifest, self._prune)
            self._writer.start()
        if wait:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint being written. Raises `CheckpointError` if it could not be written."""
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        writer.finish()
        self.durable = self._writing

    def close(self, wait_s: float = 30.0) -> None:
        """At the end of a run that failed: let the checkpoint being written become whole, if it does soon."""
        if self._writer is not None:
            self._writer.join(wait_s)

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole; called on rank 0, which holds the run's lock.

        A damaged one is named in a warning and moved aside, so that the run can commit that step again and the
        count of kept checkpoints is one of whole ones. What a killed writer left is removed.
        """
        for litter in self.folder.glob(".tmp-*"):
            shutil.rmtree(litter, ignore_errors=True)
        for path in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                read_manifest(path)
                return path
            except FtrayError as error:
                warnings.warn(f"{error}; trying the one before", stacklevel=2)
                aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        return None

    def restore(
        self,
        path: Path,
        strategy: Strategy,
        parameters: Parameters,
        optimizers: Optimizers,
        *,
        same_run: bool,
        accept_changed_data: bool = False,
    ) -> State:
        """Load a checkpoint into parameters and optimisers; called on every rank.

        Args:
            path: a committed checkpoint.
            strategy: reads this rank's part.
            parameters: what trains, by name.
            optimizers: built from the same parameters.
            same_run: the checkpoint must be of this very run; otherwise of the same structure and data.
            accept_changed_data: what decides which rows come next may differ; the position in the order stays.

        Raises:
            CheckpointError: one line, if it is damaged or belongs to something else.
        """
        manifest = read_manifest(path)
        check_identity(path, manifest["identity"], self.identity, same_run, accept_changed_data)
        strategy.restore(path, manifest, parameters, optimizers)
        state = State(**manifest["state"])
        if same_run:
            self._last_step, self.durable = state.step, state
        return state

    def _prune(self) -> None:
        prune(self.folder, self.keep, self.keep_best)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint. Raises `CheckpointError` if it is not committed or is damaged."""
    try:
        manifest: dict[str, Any] = read_json(path / MANIFEST)
    except FtrayError as error:
        raise CheckpointError(f"{path}: not a committed checkpoint ({error})") from None
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: has format {manifest['format']}, this version reads {FORMAT}; go on with the version of "
            "ftray that wrote it, or start anew under another `name`"
        )
    verify_tree(path, manifest["files"], CheckpointError)
    return manifest

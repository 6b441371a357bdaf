"""Which checkpoints stay: the newest, the best, and those that something refers to."""

import contextlib
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from ftray.core.errors import FtrayError
from ftray.core.fs import read_json, write_bytes

PINS = ".pins"


def superfluous(
    steps: Iterable[int], keep: int, losses: Mapping[int, float], pinned: Iterable[int]
) -> list[int]:
    """Steps whose checkpoints may go.

    Args:
        steps: of all committed checkpoints.
        keep: how many of the newest stay.
        losses: validation loss by step, of the checkpoints among which the best stays; empty: none stays for it.
        pinned: what must stay in any case.
    """
    ordered = sorted(steps)
    kept = {*ordered[-keep:], *pinned}
    known = [step for step in ordered if step in losses]
    if known:
        kept.add(min(known, key=lambda step: (losses[step], step)))
    return [step for step in ordered if step not in kept]


def pin(folder: Path, name: str, step: int) -> None:
    """Keep the checkpoint of a step in a folder of checkpoints until `unpin` of the same name, durably."""
    write_bytes(folder / PINS / name, f"{step}\n".encode())


def unpin(folder: Path, name: str) -> None:
    """Let go what `pin` kept; nothing if it kept nothing."""
    (folder / PINS / name).unlink(missing_ok=True)


def pinned(folder: Path) -> set[int]:
    """Steps that are pinned; a pin that cannot be read is an error, since what it keeps is not known."""
    return {int(path.read_text()) for path in (folder / PINS).glob("[!.]*")}


def prune(folder: Path, keep: int, keep_best: bool) -> None:
    """Remove the checkpoints of a folder that nothing keeps; see `superfluous`.

    A folder gets another name before its files go, so that a kill leaves a whole checkpoint or none.
    """
    paths = {int(path.name[5:]): path for path in folder.glob("step-*")}
    looked_at = paths if keep_best else {}
    losses = {step: loss for step, path in looked_at.items() if (loss := _eval_loss(path)) is not None}
    for step in superfluous(paths, keep, losses, pinned(folder)):
        with contextlib.suppress(OSError):
            shutil.rmtree(paths[step].rename(folder / f".tmp-gone-{step}"))


def _eval_loss(path: Path) -> float | None:
    try:
        found: float | None = read_json(path / "manifest.json")["state"].get("eval_loss")
        return found if found is not None and math.isfinite(found) else None
    except FtrayError:
        return None

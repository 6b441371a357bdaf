"""Out of memory, in one line: what takes it, and which settings would fit."""

import contextlib
import gc
import mmap
import traceback
from collections.abc import Iterator

import torch

from ftray.config.recipe import Recipe
from ftray.core.errors import FtrayError, TrainError
from ftray.train.meter import peak_memory_bytes
from ftray.train.plan import PARTS, gib, look_at_rows, predict_memory, what_fits

_SAYINGS = ("DefaultCPUAllocator", "can't allocate memory", "out of memory", "Cannot allocate memory")
_RESERVE_BYTES = 64 << 20
"""Address space kept for the explanation: where that is limited, not even a thread would start without it."""


def is_out_of_memory(error: BaseException) -> bool:
    """True for what CUDA, PyTorch's CPU allocator and Python raise."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(saying in str(error) for saying in _SAYINGS)


@contextlib.contextmanager
def explained(recipe: Recipe) -> Iterator[None]:
    """Inside the block, running out of memory raises a `TrainError` that says what would fit."""
    reserve = mmap.mmap(-1, _RESERVE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # takes no memory
    try:
        yield
    except FtrayError:
        raise
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        held = peak_memory_bytes(recipe.strategy.device)
        # Its frames hold the very tensors that did not fit, and the explanation needs a little itself.
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        gc.collect()
        reserve.close()
        message = explain(recipe, held)
    else:
        return
    finally:
        reserve.close()
    raise TrainError(message)


def explain(recipe: Recipe, held_bytes: int) -> str:
    """One line: the predicted parts of this recipe's memory, and smaller settings that are predicted to fit.

    Args:
        recipe: the run that did not fit.
        held_bytes: what the process held at most before it was refused more.
    """
    beginning = f"out of memory at {gib(held_bytes)}"
    if recipe.trainer is not None:
        return (
            f"{beginning} in the trainer's own loop; where it heeds them, a smaller "
            "`train.per_device_train_batch_size`, `train.gradient_checkpointing: true` or `adapt: lora` need less"
        )
    try:
        rows = look_at_rows(recipe)
        _, memory, peak = predict_memory(recipe, rows)
        # What was held was there to be held; the libraries took their part of it.
        budget = min(held_bytes, round(peak * 0.9))
        fits = what_fits(recipe, rows, budget)
    except Exception as error:  # the explanation must never hide what happened
        return (
            f"{beginning}; smaller batches, `train.gradient_checkpointing: true` or LoRA need less ({error})"
        )
    parts = ", ".join(f"{name} {gib(getattr(memory, name))}" for name in PARTS)
    advice = "; ".join(fits) if fits else "no smaller batch; use a smaller model, more memory or more workers"
    return f"{beginning}: a rank needs about {gib(peak)} ({parts}); would fit: {advice}"

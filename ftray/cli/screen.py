"""What every verb shows: one progress bar per stage, on stderr, silent when nobody looks."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

console = Console(stderr=True)
out = Console()


@contextlib.contextmanager
def bar(title: str) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar; yields `progress(done, total)`."""
    with _progress() as progress:
        task = progress.add_task(title, total=None)

        def report(done: int, total: int | None) -> None:
            progress.update(task, completed=done, total=total)

        yield report
        known = progress.tasks[task].total
        progress.update(task, completed=known or 1, total=known or 1)


@contextlib.contextmanager
def training_bar(title: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A progress bar of a run; yields a function that takes the run's records."""
    with _progress() as progress:
        task = progress.add_task(title, total=1.0)

        def report(record: dict[str, Any]) -> None:
            parts = [title, f"step {record['step']}"]
            if "loss" in record:
                parts.append(f"loss {record['loss']:.3f}")
            if "tokens_per_s" in record:
                parts.append(f"{record['tokens_per_s']:,.0f} tokens/s")
            done = record.get("progress", 0.0)
            progress.update(task, completed=done, description="  ".join(parts))

        yield report


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not sys.stderr.isatty(),
    )

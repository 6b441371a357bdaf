"""What every verb shows: one progress bar per stage, on stderr, silent when nobody looks."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

Report = Callable[[int, int | None], None]

console = Console(stderr=True)
out = Console()


@contextlib.contextmanager
def bar(title: str) -> Iterator[Report]:
    """A progress bar; yields `progress(done, total)`."""
    with _progress() as progress:
        task = progress.add_task(title, total=None)

        def report(done: int, total: int | None) -> None:
            progress.update(task, completed=done, total=total)

        yield report
        known = progress.tasks[task].total
        progress.update(task, completed=known or 1, total=known or 1)


@contextlib.contextmanager
def run_bars(name: str) -> Iterator[tuple[Report, Callable[[dict[str, Any]], None]]]:
    """Progress bars of a run; yields what takes the preparation's progress and what takes the run's records."""
    with _progress() as progress:
        rows = progress.add_task("prepare rows", total=None, visible=False)
        steps = progress.add_task(f"train {name}", total=1.0, visible=False)

        def on_prepare(done: int, total: int | None) -> None:
            progress.update(rows, completed=done, total=total, visible=True)

        def on_record(record: dict[str, Any]) -> None:
            parts = [f"train {name}", f"step {record['step']}"]
            if record.get("loss") is not None:
                parts.append(f"loss {record['loss']:.3f}")
            if "tokens_per_s" in record:
                parts.append(f"{record['tokens_per_s']:,.0f} tokens/s")
            done = record.get("progress", 0.0)
            progress.update(steps, completed=done, description="  ".join(parts), visible=True)

        yield on_prepare, on_record


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not sys.stderr.isatty(),
    )

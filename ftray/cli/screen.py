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
            parts = [f"train {name}", *record_words(record)]
            done = record.get("progress", 0.0)
            progress.update(steps, completed=done, description="  ".join(parts), visible=True)

        yield on_prepare, on_record


def record_words(record: dict[str, Any]) -> list[str]:
    """A record of metrics as the live line shows it: step, loss, speed, fraction of the peak, memory, time left."""
    words = [f"step {record['step']}"]
    for key, shown in _SHOWN.items():
        if record.get(key) is not None:
            words.append(shown(record[key]))
    return words


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


_SHOWN: dict[str, Callable[[float], str]] = {
    "loss": lambda value: f"loss {value:.3f}",
    "step_tokens_per_s": lambda value: f"{value:,.0f} tokens/s",
    "fraction_of_peak": lambda value: f"{value:.0%} of peak",
    "memory_gib": lambda value: f"{value:.1f} GiB",
    "eta_s": lambda value: f"{_clock(value)} left",
}


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not sys.stderr.isatty(),
    )

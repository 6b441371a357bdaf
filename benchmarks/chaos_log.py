"""What a campaign of kills keeps in its folder, so that the same command goes on with it."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar


class Timed(Protocol):
    """What became of one disturbed piece of work: a data class of plain fields."""

    wall_s: float


T = TypeVar("T", bound=Timed)


def go_on(
    folder: Path,
    minutes: float,
    read: Callable[..., T],
    reference: Callable[[], None],
    disturbed: Callable[[int], T],
    quiet: bool,
) -> tuple[list[T], float, str | None]:
    """Disturb one after the other, one at least, until the time is over.

    Args:
        folder: of the campaign; what earlier commands found there counts.
        minutes: time after which nothing further is begun.
        read: makes an outcome of its fields.
        reference: does what the disturbed work is compared with.
        disturbed: disturbs the piece of work of that number.
        quiet: do not print each outcome.

    Returns:
        All outcomes in the folder, minutes spent on them, and what went wrong with the campaign itself.
    """
    done = folder / "outcomes.jsonl"
    before = done.read_text().splitlines() if done.exists() else []
    outcomes = [read(**json.loads(line)) for line in before]
    first, started, problem = len(outcomes), time.monotonic(), None
    before_s = sum(outcome.wall_s for outcome in outcomes)
    try:
        reference()
        while len(outcomes) == first or time.monotonic() - started < minutes * 60:
            outcomes.append(disturbed(len(outcomes)))
            line = json.dumps(vars(outcomes[-1]))
            with done.open("a") as file:
                file.write(line + "\n")
            if not quiet:
                print(line, flush=True)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    return outcomes, round((before_s + time.monotonic() - started) / 60, 1), problem

"""How many workers a strategy runs on: a number, or the least and the most."""

from typing import Annotated, Any

from pydantic import BeforeValidator


def _read(value: Any) -> Any:
    pair = list(value) if isinstance(value, list | tuple) else [value, value]
    are_whole = all(isinstance(number, int) and not isinstance(number, bool) for number in pair)
    if not are_whole or len(pair) != 2 or not 1 <= pair[0] <= pair[1]:
        raise ValueError("write `2`, or `[1, 4]` for any number from 1 to 4")
    return tuple(pair) if isinstance(value, list | tuple) else value


NumWorkers = Annotated[int | tuple[int, int], BeforeValidator(_read)]
"""`2`, or `[1, 4]`: as many as the cluster has room for, while the run goes on."""


def bounds(workers: int | tuple[int, int]) -> tuple[int, int]:
    """The least and the most workers."""
    return (workers, workers) if isinstance(workers, int) else workers

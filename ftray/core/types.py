"""Small types shared by every part."""

import math
import re
from collections.abc import Callable
from typing import Any

Progress = Callable[[int, int | None], None]
"""`progress(done, total)`: units done so far, of `total` (None: not known)."""

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
"""Names of deltas, runs and tenants: safe as one path component and as a label."""


def no_progress(done: int, total: int | None) -> None:
    """The `Progress` that shows nothing."""


def finite(value: Any) -> Any:
    """The same plain data with numbers that JSON has no word for (NaN, infinities) as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return value


def is_name(text: str) -> bool:
    """True if `text` is a whole valid name (`NAME_PATTERN`)."""
    return NAME_PATTERN.fullmatch(text) is not None

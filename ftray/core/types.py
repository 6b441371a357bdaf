"""Small types shared by every part."""

import re
from collections.abc import Callable

Progress = Callable[[int, int | None], None]
"""`progress(done, total)`: units done so far, of `total` (None: not known)."""

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
"""Names of deltas, runs and tenants: safe as one path component and as a label."""


def no_progress(done: int, total: int | None) -> None:
    """The `Progress` that shows nothing."""


def is_name(text: str) -> bool:
    """True if `text` is a whole valid name (`NAME_PATTERN`)."""
    return NAME_PATTERN.fullmatch(text) is not None

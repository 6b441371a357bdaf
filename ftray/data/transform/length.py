"""Filter by length in characters."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from ftray.core.errors import ConfigError
from ftray.core.spec import spec
from ftray.data.rows import per_row, span_texts


@spec
class Length:
    """Keep rows whose whole text has at least `min_chars` and at most `max_chars` characters."""

    min_chars: int = Field(default=1, ge=0)
    """Shortest text that stays."""
    max_chars: int | None = Field(default=None, ge=1)
    """Longest text that stays; null: any. Tokens are limited by `data.max_length`."""

    def __post_init__(self) -> None:
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ConfigError(f"max_chars: {self.max_chars} is below min_chars; raise it or leave it out")

    def __call__(self, rows: pa.Table) -> tuple[pa.Table, Counter[str]]:
        chars = per_row(rows, np.asarray(pc.utf8_length(span_texts(rows))))
        short = chars < self.min_chars
        long = chars > self.max_chars if self.max_chars is not None else np.zeros_like(short)
        kept = rows.filter(pa.array(~(short | long)))
        return kept, Counter(short=int(short.sum()), long=int(long.sum()))

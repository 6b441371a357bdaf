"""Filter by length in characters and words."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from ftray.core.errors import ConfigError
from ftray.core.spec import spec
from ftray.data.rows import per_row, span_texts
from ftray.data.transform.base import Applied


@spec
class Length:
    """Keep rows whose whole text has so many characters and words; counted under the first limit it breaks."""

    min_chars: int = Field(default=1, ge=0)
    """Shortest text that stays."""
    max_chars: int | None = Field(default=None, ge=1)
    """Longest text that stays; null: any. Tokens are limited by `data.max_length`."""

    min_words: int | None = Field(default=None, ge=1)
    """Fewest words (runs without white space); null: any."""
    max_words: int | None = Field(default=None, ge=1)
    """Most words; null: any."""

    def __post_init__(self) -> None:
        if self.max_words is not None and self.max_words < (self.min_words or 1):
            raise ConfigError(f"max_words: {self.max_words} is below min_words; raise it or leave it out")
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ConfigError(f"max_chars: {self.max_chars} is below min_chars; raise it or leave it out")

    def __call__(self, rows: pa.Table) -> Applied:
        texts = span_texts(rows)
        chars = per_row(rows, np.asarray(pc.utf8_length(texts)))
        rules = {"short": chars < self.min_chars}
        if self.max_chars is not None:
            rules["long"] = chars > self.max_chars
        if self.min_words is not None or self.max_words is not None:
            words = per_row(rows, np.asarray(pc.count_substring_regex(texts, r"\S+")))
            rules["few_words"] = words < (self.min_words or 0)
            rules["many_words"] = words > (self.max_words or np.inf)
        broken, counts = np.zeros(rows.num_rows, np.bool_), Counter[str]()
        for rule, breaks in rules.items():
            counts[rule] = int((breaks & ~broken).sum())
            broken |= breaks
        return Applied(rows.filter(pa.array(~broken)), +counts)

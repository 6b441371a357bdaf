"""Filter text by simple signs of quality (Rae et al., arXiv:2112.11446, appendix A.1.1)."""

from collections import Counter

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from ftray.core.errors import ConfigError
from ftray.core.spec import spec
from ftray.data.rows import per_row, span_texts
from ftray.data.transform.base import Applied

_WORD, _ALPHABETIC = r"\S+", r"[^\s\pL]*\pL\S*"
_SYMBOL = r"#|…|\.\.\."
_LINE, _BULLET, _ELLIPSIS = r"(?m)^.*\S.*$", r"(?m)^[ \t]*[-*•‣●◦–]\s", r"(?m)(?:…|\.\.\.)[ \t]*$"


@spec
class Quality:
    """Drop rows that hardly are prose; a row is counted under the first rule it breaks.

    The default limits are the paper's, for web pages in languages with spaces: too strict for code, chats and short
    answers.
    """

    min_words: int = Field(default=50, ge=0)
    """Fewest words."""
    max_words: int = Field(default=100_000, ge=1)
    """Most words."""
    min_word_chars: float = Field(default=3, ge=0)
    """Shortest mean word."""
    max_word_chars: float = Field(default=10, gt=0)
    """Longest mean word."""
    max_symbols: float = Field(default=0.1, ge=0)
    """Most hash signs and ellipses for each word."""
    min_alphabetic: float = Field(default=0.8, ge=0, le=1)
    """Smallest share of words with a letter."""
    max_bullets: float = Field(default=0.9, ge=0, le=1)
    """Largest share of lines that begin with a bullet."""
    max_ellipses: float = Field(default=0.3, ge=0, le=1)
    """Largest share of lines that end with an ellipsis."""
    max_repeated_lines: float = Field(default=0.3, ge=0, le=1)
    """Largest share of lines that repeat an earlier one."""

    def __post_init__(self) -> None:
        for low, high in (("min_words", "max_words"), ("min_word_chars", "max_word_chars")):
            if getattr(self, high) < getattr(self, low):
                raise ConfigError(f"{high}: {getattr(self, high)} is below {low}; raise it")

    def __call__(self, rows: pa.Table) -> Applied:
        words, lines = _count(rows, _WORD), _count(rows, _LINE)
        spaces = _count(rows, r"\s")
        chars = per_row(rows, np.asarray(pc.utf8_length(span_texts(rows)))) - spaces
        mean = chars / np.maximum(1, words)
        rules = {
            "few_words": words < self.min_words,
            "many_words": words > self.max_words,
            "short_words": mean < self.min_word_chars,
            "long_words": mean > self.max_word_chars,
            "symbols": _count(rows, _SYMBOL) > self.max_symbols * words,
            "not_alphabetic": _count(rows, _ALPHABETIC) < self.min_alphabetic * words,
            "bullets": _count(rows, _BULLET) > self.max_bullets * lines,
            "ellipses": _count(rows, _ELLIPSIS) > self.max_ellipses * lines,
            "repeated_lines": _repeated(rows) > self.max_repeated_lines * lines,
        }
        broken = np.zeros(rows.num_rows, np.bool_)
        counts = Counter[str]()
        for rule, breaks in rules.items():
            counts[rule] = int((breaks & ~broken).sum())
            broken |= breaks
        return Applied(rows.filter(pa.array(~broken)), counts)


def _count(rows: pa.Table, pattern: str) -> npt.NDArray[np.int64]:
    """Matches of a pattern in each row."""
    return per_row(rows, np.asarray(pc.count_substring_regex(span_texts(rows), pattern)))


def _repeated(rows: pa.Table) -> npt.NDArray[np.int64]:
    """Lines of each row that repeat an earlier one of the same span."""
    repeated = []
    for text in span_texts(rows).to_pylist():
        lines = [line for line in map(str.strip, text.split("\n")) if line]
        repeated.append(len(lines) - len(set(lines)))
    return per_row(rows, np.array(repeated, np.int64))

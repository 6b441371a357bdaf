"""Filter by language, told from byte n-grams by a small model that comes with its library (py3langid)."""

import functools
from collections import Counter
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from ftray.core.errors import ConfigError
from ftray.core.spec import spec
from ftray.data.rows import span_counts, span_texts
from ftray.data.transform.base import Applied


@spec
class Language:
    """Keep rows in some languages; counts by the language found.

    A row's language is that of the beginning of its whole text. Texts of few characters are not judged but kept.
    """

    keep: list[str] = Field(min_length=1)
    """Languages that stay, as ISO 639-1 codes (`en`, `de`)."""
    min_probability: float = Field(default=0.5, ge=0, le=1)
    """Probability below which a language counts as unknown."""
    unknown: Literal["keep", "drop"] = "keep"
    """What happens to rows whose language is unknown; either way they are counted."""
    min_chars: int = Field(default=20, ge=1)
    """Texts shorter than this are not judged."""
    sample_chars: int = Field(default=1000, ge=20)
    """Characters that are looked at."""

    def __post_init__(self) -> None:
        known = set(_identifier().labels)
        if strange := [code for code in self.keep if code not in known]:
            raise ConfigError(
                f"keep: {strange[0]!r} is no language known here; known: {', '.join(sorted(known))}"
            )

    def __call__(self, rows: pa.Table) -> Applied:
        texts, position = span_texts(rows).to_pylist(), 0
        filtered, unjudged = Counter[str](), Counter[str]()
        stays = np.ones(rows.num_rows, np.bool_)
        for row, count in enumerate(span_counts(rows)):
            code = self._language(texts[position : position + count])
            position += count
            if code in self.keep:
                continue
            stays[row] = code == "short" or (code == "unknown" and self.unknown == "keep")
            (unjudged if stays[row] else filtered)[code] += 1
        return Applied(rows.filter(pa.array(stays)), filtered, unjudged)

    def _language(self, texts: list[str]) -> str:
        sample = "\n".join(text[: self.sample_chars] for text in texts)[: self.sample_chars]
        if len(sample.strip()) < self.min_chars:
            return "short"
        code, probability = _identifier().classify(sample)
        return str(code) if probability >= self.min_probability else "unknown"


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

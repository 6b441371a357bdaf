"""Exact deduplication: of rows with the same normalised text, the first in the data set stays."""

import re

import numpy as np
import pyarrow as pa
import xxhash

from ftray.core.spec import spec
from ftray.data.rows import span_counts, span_kinds, span_texts
from ftray.data.transform.base import Decider, Mask

_SPACE = re.compile(r"\s+")


@spec
class ExactDedup:
    """Drop rows that repeat an earlier row; a barrier over the whole data set."""

    ignore_case: bool = True
    """Upper and lower case count as the same."""
    ignore_space: bool = True
    """Runs of white space count as one space."""

    @property
    def rule(self) -> str:
        """The rule's name in counts."""
        return "duplicate"

    def keys(self, rows: pa.Table) -> list[bytes]:
        """128-bit digests of the spans: what each is, and its normalised text."""
        texts, kinds, position, keys = span_texts(rows).to_pylist(), span_kinds(rows).to_pylist(), 0, []
        for count in span_counts(rows):
            digest = xxhash.xxh3_128()
            for kind, text in zip(
                kinds[position : position + count], texts[position : position + count], strict=True
            ):
                # An answer that is desirable is not the same row when it is undesirable.
                content = f"{kind}:{self._normalise(text)}".encode()
                # Lengths keep ("ab", "c") and ("a", "bc") apart.
                digest.update(len(content).to_bytes(8, "little") + content)
            keys.append(digest.digest())
            position += count
        return keys

    def keep(self, keys: list[list[bytes]]) -> list[Mask]:
        """The first row of each key."""
        return self.running()(keys)

    def running(self) -> Decider:
        """The same, a part of the units at a time; the keys of all rows so far are held in memory."""
        seen: set[bytes] = set()

        def decide(keys: list[list[bytes]]) -> list[Mask]:
            masks = []
            for unit in keys:
                mask = np.zeros(len(unit), np.bool_)
                for index, key in enumerate(unit):
                    if key not in seen:
                        seen.add(key)
                        mask[index] = True
                masks.append(mask)
            return masks

        return decide

    def _normalise(self, text: str) -> str:
        text = text.casefold() if self.ignore_case else text
        return _SPACE.sub(" ", text).strip() if self.ignore_space else text

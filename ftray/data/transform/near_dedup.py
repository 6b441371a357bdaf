"""Near deduplication: of rows whose texts are nearly the same, the first in the data set stays."""

from typing import ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from ftray.core.spec import spec
from ftray.data.transform.base import Mask
from ftray.data.transform.minhash import as_keys, clusters, from_keys, signatures


@spec
class NearDedup:
    """Keep one row of every cluster of near duplicates (MinHash with LSH); a barrier over the whole data set."""

    rule: ClassVar[str] = "near_duplicate"

    threshold: float = Field(default=0.7, gt=0.1, le=1)
    """Estimated share of common word n-grams (Jaccard) from which two rows are near duplicates.

    The estimate is off by about 0.04: at 0.7 practically all pairs that share 0.8 are found, and few below 0.6.
    """
    ngram: int = Field(default=5, ge=1, le=32)
    """Words in an n-gram."""

    def keys(self, rows: pa.Table) -> list[bytes]:
        """Signatures, 512 bytes a row."""
        return as_keys(signatures(rows, self.ngram))

    def keep(self, keys: list[list[bytes]]) -> list[Mask]:
        """The first row of each cluster."""
        flat = [key for unit in keys for key in unit]
        first = clusters(from_keys(flat), self.threshold) == np.arange(len(flat))
        return np.split(first, np.cumsum([len(unit) for unit in keys])[:-1])

"""Leave some targets out of the loss, so that no text can be learnt by heart.

Hans et al., "Be like a Goldfish, Don't Memorize!" (arXiv:2406.10209). With `hash` a token is left out by
what stands before it: wherever a passage is repeated the same tokens are missing, so the model never learns them
from a copy. With `random` every epoch leaves out others.
"""

from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ftray.core.spec import spec
from ftray.data.read import IGNORE_INDEX, RowArrays

_PRIME = np.uint64(0x9E3779B97F4A7C15)


@spec
class Goldfish:
    """Leave one target in `k` out of the loss of training."""

    stage: ClassVar[str] = "read"
    for_pairs: ClassVar[bool] = False
    for_validation: ClassVar[bool] = False

    k: int = Field(default=4, ge=2)
    """One target in so many is left out."""
    choose: Literal["hash", "random"] = "hash"
    """By the tokens before it, or by a new draw in every epoch."""
    context_width: int = Field(default=13, ge=1)
    """With `hash`: how many tokens before it decide; targets nearer to their document's beginning stay."""

    def read(self, row: RowArrays, random: np.random.Generator) -> RowArrays:
        """The row with fewer targets."""
        if self.choose == "random":
            out = random.random(len(row.input_ids)) * self.k < 1
        else:
            out = self._by_context(row)
        labels = np.where(out, np.int32(IGNORE_INDEX), row.labels)
        return row._replace(labels=labels, weights=np.where(out, np.float32(0), row.weights))

    def _by_context(self, row: RowArrays) -> npt.NDArray[np.bool_]:
        """True where the `context_width` tokens before a token say that it is left out."""
        total, width = len(row.input_ids), self.context_width
        out = np.zeros(total, np.bool_)
        if total <= width:
            return out
        ids = row.input_ids.astype(np.uint64) + np.uint64(1)
        digest = np.zeros(total - width, np.uint64)
        for place in range(width):
            digest = digest * _PRIME + ids[place : total - width + place]
        digest ^= digest >> np.uint64(29)
        digest *= np.uint64(0xBF58476D1CE4E5B9)
        digest ^= digest >> np.uint64(32)
        starts = np.cumsum(row.doc_lens) - row.doc_lens
        place_in_document = np.arange(total) - np.repeat(starts, row.doc_lens)
        out[width:] = (digest % np.uint64(self.k) == 0) & (place_in_document[width:] >= width)
        return out

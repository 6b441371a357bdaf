"""Learn what stands before the answers too, with a weight of its own.

With a weight of 1 it is Axolotl's `train_on_inputs` and LLaMA-Factory's `train_on_prompt`.
"""

from typing import ClassVar

import numpy as np
from pydantic import Field

from ftray.core.spec import spec
from ftray.data.read import IGNORE_INDEX, RowArrays


@spec
class PromptWeight:
    """Make every token of context a target."""

    stage: ClassVar[str] = "read"
    for_pairs: ClassVar[bool] = False
    for_validation: ClassVar[bool] = False

    weight: float = Field(default=0.1, gt=0)
    """Weight of a token of context in the loss; the answers keep theirs."""

    def read(self, row: RowArrays, random: np.random.Generator) -> RowArrays:
        """The row with all tokens as targets but the first of each document, which nothing predicts."""
        context = row.labels == IGNORE_INDEX
        context[np.cumsum(row.doc_lens) - row.doc_lens] = False
        labels = np.where(context, row.input_ids, row.labels)
        return row._replace(labels=labels, weights=np.where(context, np.float32(self.weight), row.weights))


@spec
class EveryToken(PromptWeight):
    """Make every token a target as any other, in validation as well; what the objective `lm` begins with."""

    for_pairs: ClassVar[bool] = True
    for_validation: ClassVar[bool] = True

    weight: float = Field(default=1.0, gt=0)
    """Weight of a token of context in the loss."""

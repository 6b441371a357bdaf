"""The model as an objective sees it."""

from typing import Any

import torch

from ftray.data.batch import Batch
from ftray.model.head import Head


class Policy:
    """Hidden states of a batch, and the head that turns them into logits; never all logits at once."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.head = Head(model)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Last hidden states `[N, D]` of a padding-free batch of `N` tokens."""
        output = self.model.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            cu_seq_lens_q=batch.cu_seq_lens,
            use_cache=False,
        )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

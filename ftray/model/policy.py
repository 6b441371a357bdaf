"""The model as an objective sees it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ftray.data.batch import Batch
from ftray.model.head import Head


class Policy:
    """Hidden states of a batch, and the head that turns them into logits; never all logits at once.

    Args:
        model: what trains.
        reference: a frozen model that stands for what it was before; None where an adapter can be turned off.
        teacher: another frozen model, if the objective learns from one.
    """

    def __init__(self, model: Any, *, reference: Any = None, teacher: Any = None) -> None:
        self.model = model
        self.head = Head(model)
        self.teacher = None if teacher is None else Policy(teacher.eval())
        self._reference = None if reference is None else reference.eval()

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Last hidden states `[N, D]` of a padding-free batch of `N` tokens."""
        # A sharded model is entered through its root, which gathers what lies outside the layers.
        trunk = getattr(self.model, "ftray_trunk", self.model.base_model)
        output = trunk(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            cu_seq_lens_q=batch.cu_seq_lens,
            use_cache=False,
        )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Inside the block this policy is the frozen reference: no gradients, no dropout, the adapter off.

        Leave the block before anything of the policy's own forward pass: adapters must stay as they are until
        `backward()` has returned.
        """
        model, head, training = self.model, self.head, self.model.training
        with torch.no_grad():
            if self._reference is not None:
                self.model, self.head = self._reference, Head(self._reference)
                try:
                    yield
                finally:
                    self.model, self.head = model, head
                return
            model.eval()
            try:
                with model.ftray_route.use(None):
                    yield
            finally:
                model.train(training)

"""The model as an objective sees it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ftray.data.batch import Batch, join
from ftray.model.head import Head

ForEach = Callable[["Policy", Sequence[Batch]], Sequence[torch.Tensor]]
"""Something of a policy that is found for several batches in one pass, batch by batch."""


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
        return self.of_batch(hidden_states, batch)

    def of_batch(self, function: ForEach, batch: Batch) -> torch.Tensor:
        """A batch's part of what a function finds; `Together` finds it for the batches of others as well."""
        return function(self, [batch])[0]

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


def hidden_states(policy: Policy, batches: Sequence[Batch]) -> Sequence[torch.Tensor]:
    """Last hidden states `[N, D]` of each batch, from one pass over them all."""
    joined, model = join(batches), policy.model
    # A sharded model is entered through its root, which gathers what lies outside the layers.
    trunk = getattr(model, "ftray_trunk", model.base_model)
    output = trunk(
        input_ids=joined.input_ids,
        position_ids=joined.position_ids,
        cu_seq_lens_q=joined.cu_seq_lens,
        use_cache=False,
    )
    parts: Sequence[torch.Tensor] = output.last_hidden_state[0].split([b.num_tokens for b in batches])
    return parts


class Together(Policy):
    """A policy that is asked about several batches one by one, and answers from one pass over all of them.

    Args:
        policy: the policy.
        batches: those of one pass, in the order of the segments of the model's route.
    """

    def __init__(self, policy: Policy, batches: Sequence[Batch]) -> None:
        super().__init__(policy.model)
        self.teacher, self._reference = policy.teacher, policy._reference
        self._batches = list(batches)
        self._found: dict[tuple[ForEach, bool], Sequence[torch.Tensor]] = {}
        self._is_reference = False

    def of_batch(self, function: ForEach, batch: Batch) -> torch.Tensor:
        """See `Policy.of_batch`; of a batch that is none of the pass, its own."""
        place = next((n for n, other in enumerate(self._batches) if other is batch), None)
        if place is None:
            return function(self, [batch])[0]
        key = function, self._is_reference
        if key not in self._found:
            self._found[key] = function(self, self._batches)
        return self._found[key][place]

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """See `Policy.reference`; all batches of the pass are asked about together there too."""
        with super().reference():
            self._is_reference = True
            try:
                yield
            finally:
                self._is_reference = False

"""Train every weight of the base."""

from pathlib import Path
from typing import Any

from ftray.adapt.base import Facts, Tensors
from ftray.core.spec import spec
from ftray.model.save import save_model


@spec
class Full:
    """Full fine-tuning: the delta is the set of replacement weights, an ordinary Hugging Face folder."""

    def facts(self) -> Facts:
        """Replacement weights take a model of their own."""
        return Facts(kind="replacement", mergeable=True, mixed_batch=False)

    def apply(self, model: Any, seed: int) -> None:
        """Mark all parameters as trainable."""
        del seed
        for parameter in model.parameters():
            parameter.requires_grad_(True)

    def save(self, model: Any, trained: Tensors, folder: Path, base_name: str) -> None:
        """Write configuration and weights as `save_pretrained` does, one tensor at a time."""
        del base_name
        save_model(model, trained, folder)

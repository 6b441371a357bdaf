"""Plain `transformers` and `peft`, one prompt at a time: what every answer of an engine is held to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ftray.engine.api import Output, Request

# Two logits nearer than this may swap between float32 products of different shapes; either token is right.
MARGIN = 1e-3


class Reference:
    """Greedy decoding of one prompt at a time by plain `transformers` and `peft`."""

    def __init__(self, base: Path, adapters: Mapping[str, Path]) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        def fresh() -> Any:
            return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

        self.models: dict[str | None, Any] = {None: fresh()}
        self.models |= {name: PeftModel.from_pretrained(fresh(), path) for name, path in adapters.items()}

    @torch.no_grad()
    def logits(self, ids: list[int], delta: str | None) -> torch.Tensor:
        return self.models[delta](input_ids=torch.tensor([ids])).logits[0]

    def check(self, request: Request, output: Output) -> None:
        """Every token must be the most likely one after those before it, up to the margin."""
        self.check_tokens(list(request.prompt_ids), output.token_ids, request.delta)

    def check_tokens(self, prompt: list[int], tokens: list[int], delta: str | None) -> None:
        """The same for tokens alone."""
        logits = self.logits(prompt + tokens[:-1], delta)[len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (logits.max(-1).values - chosen <= MARGIN).all(), (delta, prompt, tokens)

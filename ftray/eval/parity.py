"""Measure the parity certificate of a delta: alone, merged into its base, and served by an engine."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ftray.core.errors import DeltaError
from ftray.delta import manifest
from ftray.delta.parity import Parity
from ftray.delta.source import Sites
from ftray.engine.api import EngineConfig, Request, Sampling
from ftray.model.build import DTYPES, cast_weights, load_model
from ftray.model.folder import resolve_folder
from ftray.model.tokenizer import load_tokenizer
from ftray.registry.shelf import VERSION_FILE

_TEXTS = (
    "The quick brown fox jumps over the lazy dog. Then it sleeps in the shade until the evening comes.",
    "def area(radius: float) -> float:\n    return 3.14159 * radius ** 2\n",
    'Größe, naïve, 東京, Привет, 12,345.67 € and {"key": [1, 2, 3]}',
)
_MAX_TOKENS, _NUM_RANDOM = 96, 96


def certify(folder: Path, base: str, engine: EngineConfig) -> Parity:
    """Compare the log-probabilities of fixed prompts' tokens.

    Args:
        folder: the delta.
        base: folder or Hub id of its base.
        engine: what serves it.

    Raises:
        DeltaError: if the delta does not fit the base or the engine refuses it.
    """
    dtype = str(getattr(engine, "dtype", "float32"))
    delta = manifest.read(folder, beside=frozenset({VERSION_FILE}))
    path = resolve_folder(base)
    prompts = _prompts(load_tokenizer(path))
    model = load_model(path, attn="sdpa")
    sites = Sites(model, path)
    names = [name for name, _ in model.named_parameters()]
    source = sites.open(folder, delta.kind)
    with torch.no_grad():
        alone = _logprobs(source.attached(model), prompts)
        source.detach(model)
        parameters = dict(model.named_parameters())
        for name in names:
            change = source.change(name, parameters[name])
            if change is not None:
                parameters[name].add_(change)
        merged = _logprobs(cast_weights(model, DTYPES[dtype]), prompts)
    del model, sites, source, parameters
    info, served = _served(engine, base, folder, prompts)
    return Parity(
        delta=delta.digest,
        base=delta.base.digest,
        engine=info,
        dtype=dtype,
        num_prompts=len(prompts),
        num_tokens=len(alone),
        merged_difference=float((alone - merged).abs().max()),
        served_difference=float((alone - served).abs().max()),
        versions={name: version(name) for name in ("ftray", "torch", "transformers")},
    )


def _prompts(tokenizer: Any) -> list[list[int]]:
    """Fixed texts, and tokens drawn from the whole vocabulary."""
    texts = [tokenizer(text).input_ids[:_MAX_TOKENS] for text in _TEXTS]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(tokenizer), (_NUM_RANDOM,), generator=generator)
    return [*texts, drawn.tolist()]


def _logprobs(model: Any, prompts: list[list[int]]) -> torch.Tensor:
    """Log-probability of every token but the first of each prompt, in plain transformers."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        logprobs = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        found.append(logprobs.gather(1, ids[0, 1:, None])[:, 0])
    return torch.cat(found)


def _served(
    config: EngineConfig, base: str, folder: Path, prompts: list[list[int]]
) -> tuple[str, torch.Tensor]:
    """The same by an engine that holds the delta beside its base, all prompts in one batch."""
    engine = config.build(base)
    engine.load_delta("candidate", str(folder))
    sampling = Sampling(max_tokens=0, prompt_logprobs=0)
    requests = [
        Request(id=str(number), prompt_ids=prompt, delta="candidate", sampling=sampling)
        for number, prompt in enumerate(prompts)
    ]
    values: list[float] = []
    for output in engine.generate(requests):
        if output.error or output.prompt_logprobs is None:
            raise DeltaError(f"{folder}: the engine does not answer under it ({output.error})")
        values += [token.logprob for token in output.prompt_logprobs if token is not None]
    return engine.info.engine, torch.tensor(values)

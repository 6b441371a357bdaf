"""Whether a model really goes through the paged attention: some accept the registration and ignore it.

A long and a short prompt go through the cache in chunks and single tokens, together, and every logit is
compared with the plain model's on each prompt alone.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from ftray.engine import paged
from ftray.engine.api import Request, Sampling
from ftray.engine.base import attention_span
from ftray.engine.scheduler import Row, Scheduler, Sequence

_BLOCK_SIZE = 16
RELATIVE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2}


class _Runner(Protocol):
    calls: int

    def forward(self, rows: list[Row], keys: list[str | None], keep: list[int]) -> torch.Tensor: ...


MakeRunner = Callable[[Any, Scheduler], _Runner]


def self_check(model: Any, make_runner: MakeRunner, max_positions: int) -> str | None:
    """Compare the paged path with the plain model.

    Args:
        model: the model, its attention set to the paged one; it is left so.
        make_runner: builds the runner to be checked, with room for what the scheduler says; it may change the
            model's layers, for the plain model has answered by then.
        max_positions: most tokens the model takes.

    Returns:
        None if they agree; otherwise the reason, in words.
    """
    # Longer than any window, or a wrong window would go unseen.
    long = min(max(attention_span(model.config) + 24, 48), max_positions)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    lengths = (long, min(7, max_positions))
    prompts = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]
    try:
        plain_logits = _plain(model, prompts)
        paged_logits, calls = _through_cache(make_runner, model, prompts)
    # Models fail here in ways of their own; any of them means that this path is not for this model.
    except Exception as error:
        message = " ".join(str(error).split())[:120]
        return f"the paged attention cannot run it ({type(error).__name__}: {message})"
    layers = model.config.get_text_config().num_hidden_layers
    if calls != layers:
        return f"{calls} of its {layers} layers use the registered attention"
    scale = max(1.0, float(plain_logits.abs().max()))
    difference = float((paged_logits - plain_logits).abs().max()) / scale
    tolerance = RELATIVE_TOLERANCE[model.dtype]
    if not difference <= tolerance:
        return (
            f"logits differ from the plain model's by {difference:.1e} of their size (limit {tolerance:.0e})"
        )
    return None


def _through_cache(make_runner: MakeRunner, model: Any, prompts: list[list[int]]) -> tuple[torch.Tensor, int]:
    longest = max(len(prompt) for prompt in prompts)
    per_row = -(-longest // _BLOCK_SIZE)
    scheduler = Scheduler(
        max_num_seqs=len(prompts),
        max_batch_tokens=longest * len(prompts),
        num_blocks=per_row * len(prompts),
        block_size=_BLOCK_SIZE,
        max_length=longest,
    )
    runner = make_runner(model, scheduler)
    seqs = []
    for number, prompt in enumerate(prompts):
        request = Request(id=str(number), prompt_ids=prompt, sampling=Sampling(max_tokens=1))
        blocks = scheduler.pool.take(per_row)
        seqs.append(Sequence(request, 0, prompt, row=number, blocks=blocks))
    gathered: list[list[torch.Tensor]] = [[] for _ in prompts]
    # A third of each prompt, then all but two tokens, then the two one by one: every kind of row, mixed.
    bounds = [_bounds(len(prompt)) for prompt in prompts]
    for part in range(len(bounds[0]) - 1):
        rows = [Row(seq, b[part], b[part + 1] - b[part]) for seq, b in zip(seqs, bounds, strict=True)]
        rows = [row for row in rows if row.length]
        total = sum(row.length for row in rows)
        logits = runner.forward(rows, [None] * len(rows), list(range(total))).float()
        for row, piece in zip(rows, torch.split(logits, [row.length for row in rows]), strict=True):
            gathered[row.seq.row].append(piece)
    return torch.cat([piece for pieces in gathered for piece in pieces]), runner.calls


def _bounds(length: int) -> list[int]:
    return sorted([0, length // 3, max(0, length - 2), max(0, length - 1), length])


@torch.inference_mode()
def _plain(model: Any, prompts: list[list[int]]) -> torch.Tensor:
    device = next(model.parameters()).device
    try:
        try:
            model.set_attn_implementation("sdpa")
        except (ValueError, ImportError):
            model.set_attn_implementation("eager")
        outputs = [model(input_ids=torch.tensor([ids], device=device), use_cache=False) for ids in prompts]
    finally:
        model.set_attn_implementation(paged.NAME)
    return torch.cat([output.logits[0] for output in outputs]).float()

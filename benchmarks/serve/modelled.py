"""What holding prompts back does, without a clock: the engine's scheduler over steps of a formula's length."""

import random
from collections.abc import Sequence

from benchmarks.serve.sections import Figures, Section, percentile
from ftray.engine.pace import Pace
from ftray.engine.request import Request, Sampling
from ftray.engine.scheduler import Scheduler
from ftray.engine.sequence import Row

_STEP_S = {"40m": (0.0063, 0.00055), "235m": (0.026, 0.0024)}
"""Seconds of a step and of each of its tokens: 16 single tokens take 15 and 64 ms, as measured."""
_ROWS = 16
_REQUESTS = 400


def pace(_: Section, shape: str) -> Figures:
    """16 rows that are always full, prompts of 16 to 110 tokens, answers of 32 to 96; `prompt_share` or none."""
    figures: Figures = {}
    step_s, token_s = _STEP_S[shape]
    for name, share in (("held", 0.3), ("free", None)):
        firsts, gaps, per_s = _run(step_s, token_s, share)
        whole = step_s + _ROWS * token_s
        figures |= {
            f"modelled_inter_token_p95_vs_step_{name}": percentile(gaps, 95) / whole,
            f"modelled_ttft_steps_p50_{name}": percentile(firsts, 50) / whole,
            f"modelled_tokens_per_s_{name}": per_s,
        }
    return figures


def _run(
    step_s: float, token_s: float, share: float | None
) -> tuple[Sequence[float], Sequence[float], float]:
    """Seconds to first tokens and between tokens, and tokens of prompts and answers a second."""
    draw, now, asked, tokens = random.Random(0), 0.0, 0, 0
    scheduler = Scheduler(
        max_num_seqs=_ROWS,
        max_batch_tokens=2048,
        num_blocks=2000,
        block_size=16,
        max_length=2000,
        pace=None if share is None else Pace(share),
    )
    last: dict[str, float] = {}
    begun: set[str] = set()
    firsts: list[float] = []
    gaps: list[float] = []

    def ask() -> None:
        nonlocal asked, tokens
        prompt, new = draw.randint(16, 110), draw.randint(32, 96)
        request = Request(id=str(asked), prompt_ids=[1] * prompt, sampling=Sampling(max_tokens=new))
        scheduler.add(request)
        last[request.id] = now
        asked, tokens = asked + 1, tokens + prompt + new

    def take(row: Row) -> None:
        seq, name = row.seq, row.seq.request.id
        if seq.computed < len(seq.tokens):
            return
        seq.tokens.append(0)
        (gaps if name in begun else firsts).append(now - last[name])
        begun.add(name)
        last[name] = now
        if seq.num_generated >= seq.request.sampling.max_tokens:
            scheduler.finish(seq)
            if asked < _REQUESTS:
                ask()

    for _ in range(_ROWS):
        ask()
    while rows := scheduler.schedule():
        taken_s = step_s + token_s * sum(row.length for row in rows)
        now += taken_s
        if scheduler.pace:
            scheduler.pace.note(sum(row.length - 1 for row in rows), taken_s)
        scheduler.advance(rows)
        for row in rows:
            take(row)
    return firsts, gaps, tokens / now

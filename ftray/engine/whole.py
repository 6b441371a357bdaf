"""Whole answers out of an engine's steps."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ftray.engine.api import Engine, Output, Request


def generate(engine: Engine, requests: Iterable[Request]) -> list[Output]:
    """Add requests, step until there is no work, and join the outputs of each answer; see `Engine.generate`."""
    parts: dict[tuple[str, int], list[Output]] = {}
    try:
        for request in requests:
            engine.add(request)
            parts |= {(request.id, index): [] for index in range(request.sampling.n)}
        while engine.has_work():
            for output in engine.step():
                parts.setdefault((output.id, output.index), []).append(output)
    except BaseException:
        for request_id, _ in parts:
            engine.cancel(request_id)
        raise
    return [joined(outputs) for outputs in parts.values()]


def joined(parts: Sequence[Output]) -> Output:
    """All outputs of one answer as one."""
    logprobs = [token for part in parts for token in part.logprobs or ()]
    return replace(
        parts[-1],
        text="".join(part.text for part in parts),
        token_ids=[token for part in parts for token in part.token_ids],
        logprobs=logprobs if any(part.logprobs is not None for part in parts) else None,
        prompt_logprobs=parts[0].prompt_logprobs,
        num_cached_tokens=parts[0].num_cached_tokens,
    )

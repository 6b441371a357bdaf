"""What a client gets: log-probabilities, several answers, ends; and what is freed when it leaves."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ftray.core.errors import RequestError
from ftray.engine.api import Output, Request, Sampling
from ftray.engine.core import StepEngine
from ftray.engine.fake import FakeEngineConfig
from ftray.engine.hf_generate import HFGenerateConfig
from ftray.engine.lora_slots import SlotFactors
from ftray.engine.torch_engine import TorchEngineConfig
from tests.peft_reference import Reference


@pytest.fixture(scope="module")
def engine(tiny_base: Path, tiny_adapters: dict[str, Path]) -> StepEngine:
    engine = TorchEngineConfig(block_size=8, max_batch_tokens=32).build(str(tiny_base))
    for name, folder in tiny_adapters.items():
        engine.load_delta(name, str(folder))
    return engine


@pytest.fixture(scope="module")
def reference(tiny_base: Path, tiny_adapters: dict[str, Path]) -> Reference:
    return Reference(tiny_base, tiny_adapters)


@pytest.fixture(autouse=True)
def nothing_left(engine: StepEngine) -> Iterator[None]:
    yield
    assert not engine.has_work()
    assert engine.stats().blocks_used == 0


def ask(name: str = "x", delta: str | None = None, prompt: int = 12, **sampling: Any) -> Request:
    settings = Sampling(**({"max_tokens": 6, "ignore_eos": True} | sampling))
    return Request(id=name, prompt_ids=list(range(9, 9 + prompt)), delta=delta, sampling=settings)


def test_logprobs_are_those_of_the_model_before_any_setting(engine: StepEngine, reference: Reference) -> None:
    requests = [
        ask("x", "a", logprobs=3, temperature=1.5, top_k=4, repetition_penalty=1.5, seed=1),
        ask("y"),
        ask("z", "b", logprobs=0),
    ]
    outputs = engine.generate(requests)
    assert outputs[1].logprobs is None
    for request, output, num_top in ((requests[0], outputs[0], 3), (requests[2], outputs[2], 0)):
        prompt = list(request.prompt_ids)
        logits = reference.logits(prompt + output.token_ids[:-1], request.delta)[len(prompt) - 1 :]
        wanted = logits.log_softmax(-1)
        assert output.logprobs is not None and len(output.logprobs) == 6
        for row, (token, found) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
            assert found.token_id == token
            assert found.logprob == pytest.approx(float(wanted[row, token]), abs=1e-3)
            best = wanted[row].topk(num_top)
            assert [logprob for _, logprob in found.top] == pytest.approx(best.values.tolist(), abs=1e-3)


@pytest.mark.parametrize("start", [0, 20, 59])
def test_prompt_logprobs_come_once_whatever_was_cached_or_chunked(
    engine: StepEngine, reference: Reference, start: int
) -> None:
    engine.generate([ask("fill", "a", 60)])
    request = ask("x", "a", 60, prompt_logprobs=2, prompt_logprobs_start=start)
    parts: list[Output] = []
    engine.add(request)
    while engine.has_work():
        parts += engine.step()
    assert all(part.prompt_logprobs is None for part in parts[1:])
    found = parts[0].prompt_logprobs
    assert found is not None and len(found) == 60
    wanted = reference.logits(list(request.prompt_ids), "a").log_softmax(-1)
    silent = max(1, start)
    assert found[:silent] == [None] * silent
    for at in range(silent, 60):
        token = found[at]
        assert token is not None and token.token_id == request.prompt_ids[at]
        assert token.logprob == pytest.approx(float(wanted[at - 1, token.token_id]), abs=1e-3)
        assert [one for _, one in token.top] == pytest.approx(
            wanted[at - 1].topk(2).values.tolist(), abs=1e-3
        )


def test_a_prompt_can_be_scored_without_an_answer(engine: StepEngine) -> None:
    (output,) = engine.generate([ask(max_tokens=0, prompt_logprobs=0)])
    assert (output.finish_reason, output.token_ids, output.text) == ("length", [], "")
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 12
    with pytest.raises(RequestError, match="max_tokens"):
        Sampling(max_tokens=0)


def test_each_answer_of_several_has_its_own_end(engine: StepEngine) -> None:
    request = ask(n=3, temperature=1.2, seed=3, max_tokens=40, logprobs=0)
    texts = [output.text for output in engine.generate([request])]
    assert len(set(texts)) == 3
    stop = texts[1][5:7]
    cut = engine.generate([ask(n=3, temperature=1.2, seed=3, max_tokens=40, stop=(stop,))])
    assert [output.index for output in cut] == [0, 1, 2]
    assert (cut[1].finish_reason, cut[1].stop_reason) == ("stop", stop)
    assert [output.text for output in cut] == [text.partition(stop)[0] for text in texts]


def test_min_tokens_holds_every_end_back(engine: StepEngine) -> None:
    tokens = engine.generate([ask(max_tokens=12)])[0].token_ids
    ends = tuple(set(tokens[2:4]))
    early = engine.generate([ask(max_tokens=12, stop_token_ids=ends)])[0]
    assert early.finish_reason == "stop" and early.stop_reason in ends
    late = engine.generate([ask(max_tokens=12, stop_token_ids=ends, min_tokens=8)])[0]
    assert len(late.token_ids) >= 8
    assert not set(late.token_ids[:8]) & set(ends)


@pytest.mark.parametrize("config", [TorchEngineConfig, HFGenerateConfig])
def test_token_ids_that_the_model_lacks_harm_nobody_else(tiny_base: Path, config: Any) -> None:
    engine: StepEngine = config().build(str(tiny_base))
    requests = [ask("runs"), ask("bans", min_tokens=3, stop_token_ids=(258, 2_000_000_000))]
    alone = [engine.generate([request])[0].token_ids for request in requests]
    engine.add(requests[0])
    outputs = engine.step()
    for token in (258, -1):
        with pytest.raises(RequestError, match=f"prompt: {token} is refused; use .* 0 to 257"):
            engine.add(Request(id="lacks", prompt_ids=[9, token, 9]))
    engine.add(requests[1])
    while engine.has_work():
        outputs += engine.step()
    gained = [
        [token for output in outputs if output.id == name for token in output.token_ids]
        for name in ("runs", "bans")
    ]
    assert gained == alone and all(map(len, alone))


def test_penalties_take_part(engine: StepEngine, reference: Reference) -> None:
    request = ask(max_tokens=20, repetition_penalty=3.0, frequency_penalty=1.0)
    prompt, tokens = list(request.prompt_ids), engine.generate([request])[0].token_ids
    for count, token in enumerate(tokens):
        logits = reference.logits(prompt + tokens[:count], None)[-1]
        seen = torch.tensor(sorted({*prompt, *tokens[:count]}))
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 3, logits[seen] * 3)
        for earlier in tokens[:count]:
            logits[earlier] -= 1.0
        assert logits.max() - logits[token] <= 1e-3


@pytest.mark.parametrize("steps", [0, 1, 4, 9], ids=["queue", "prefill", "decode", "last step"])
def test_leaving_at_any_time_frees_all_at_once(
    tiny_base: Path, tiny_adapters: dict[str, Path], steps: int
) -> None:
    engine = TorchEngineConfig(block_size=8, max_batch_tokens=32, max_num_seqs=4).build(str(tiny_base))
    engine.load_delta("a", str(tiny_adapters["a"]))
    engine.add(ask("x", "a", 90, max_tokens=7, n=2))
    for _ in range(steps):
        engine.step()
    assert engine.has_work()
    engine.cancel("x")
    stats = engine.stats()
    assert (stats.blocks_used, stats.running, stats.waiting) == (0, 0, 0)
    assert engine.delta_info("a").in_flight == 0
    assert engine.step() == []
    engine.unload_delta("a")


def test_freed_blocks_full_of_nan_change_nothing(tiny_base: Path, tiny_adapters: dict[str, Path]) -> None:
    def build() -> StepEngine:
        engine = TorchEngineConfig(kv_cache_tokens=1024, max_loras=1).build(str(tiny_base))
        for name, folder in tiny_adapters.items():
            engine.register_delta(name, str(folder))
        return engine

    requests = [ask("x", "b", 50, logprobs=5), ask("y", "b", 3, logprobs=5)]
    fresh = build().generate(requests)
    used = build()
    used.generate([ask("x", "a", 50), ask("y", None, 33)])
    # A delta of the greatest rank has stood in every part of the slot, and its place is empty.
    used.unload_delta("a")
    poison(used)
    assert used.generate(requests) == fresh


def poison(engine: StepEngine) -> None:
    """Write NaN over every KV block that nobody holds and nobody may find, and over every slot out of use."""
    free = torch.tensor(engine.scheduler.pool._free)
    runner: Any = engine._runner
    with torch.inference_mode():
        for layer in runner.cache._layers.values():
            for part in layer[:2]:
                part.view(-1, engine.scheduler.block_size, *part.shape[1:])[free] = float("nan")
        found = [
            value
            for module in runner.model.modules()
            for value in vars(module).values()
            if isinstance(value, SlotFactors) and value.used
        ]
        assert found
        for slots in found:
            for slot, ranks in enumerate(slots._ranks):
                if not any(ranks):
                    slots._a_SIC[slot] = slots._b_SE[slot] = float("nan")


def test_logits_that_are_not_finite_end_that_answer_alone_and_are_not_cached(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TorchEngineConfig(block_size=8, kv_cache_tokens=512).build(str(tiny_base))
    runner: Any = engine._runner
    forward = runner.forward

    def broken(rows: list[Any], keys: list[Any], keep: list[int]) -> torch.Tensor:
        logits = forward(rows, keys, keep).clone()
        for place, row in enumerate(rows):
            if row.seq.request.id == "bad":
                logits[place] = float("nan")
        return logits

    monkeypatch.setattr(runner, "forward", broken)
    good, bad = engine.generate([ask("good", prompt=20), ask("bad", prompt=24)])
    assert (bad.finish_reason, bad.status, bad.error) == ("error", 500, "the model gave no finite logits")
    assert (good.finish_reason, len(good.token_ids)) == ("length", 6)
    assert engine.generate([ask("again", prompt=24)])[0].num_cached_tokens == 16  # what `good` wrote


@pytest.mark.parametrize("text", ["👩‍👩‍👧 and 🙂END", "naïve END café", "日本語END", "plain END"])
@pytest.mark.parametrize("stop", ["END", "🙂E", "‍👧", "é"])
def test_a_stream_equals_the_whole_and_never_shows_a_stop_string(text: str, stop: str) -> None:
    """One byte is one token, so the text and the stop string are split at every byte."""
    engine = FakeEngineConfig(text=text).build("fake")
    sampling = Sampling(max_tokens=200, stop=(stop,))
    engine.add(Request(id="x", prompt_ids=[1], sampling=sampling))
    parts: list[str] = []
    while engine.has_work():
        parts += [output.text for output in engine.step()]
    (whole,) = engine.generate([Request(id="x", prompt_ids=[1], sampling=sampling)])
    assert "".join(parts) == whole.text == text.partition(stop)[0]
    assert not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize("cut", range(1, len("👩‍👩‍👧🙂".encode()) + 1))
def test_an_answer_cut_at_any_byte_shows_whole_characters(cut: int) -> None:
    text = "👩‍👩‍👧🙂"
    engine = FakeEngineConfig(text=text).build("fake")
    (output,) = engine.generate([Request(id="x", prompt_ids=[1], sampling=Sampling(max_tokens=cut))])
    assert output.text == text.encode()[:cut].decode(errors="ignore")

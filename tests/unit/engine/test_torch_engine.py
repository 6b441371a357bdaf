"""Many deltas in one batch give, for every request, what plain PEFT gives it alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ftray.core.errors import ConfigError, DeltaError, RequestError
from ftray.engine.api import Output, Request, Sampling, ScoreItem
from ftray.engine.core import StepEngine
from ftray.engine.hf_generate import HFGenerateConfig
from ftray.engine.torch_engine import TorchEngineConfig
from ftray.testing import tiny
from tests.peft_reference import Reference

NEW_TOKENS = 12


@pytest.fixture(scope="module", params=["llama", "qwen3", "gpt2", "mistral", "gemma3", "phi3", "qwen3_moe"])
def setting(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Path], Reference]:
    root = tmp_path_factory.mktemp(request.param)
    base = tiny.tiny_base(root / "base", request.param)
    # PEFT's `all-linear` would adapt a mixture's router too, which the base computes in a way of its own.
    experts: dict[str, Any] = {
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    targets = experts if "moe" in request.param else {}
    adapters = {
        name: tiny.random_adapter(base, root / name, r=r, seed=r, **targets)
        for name, r in (("a", 4), ("b", 8))
    }
    return base, adapters, Reference(base, adapters)


def build(base: Path, adapters: dict[str, Path], **settings: Any) -> StepEngine:
    engine = TorchEngineConfig(**settings).build(str(base))
    assert engine.info.engine == "torch"
    for name, path in adapters.items():
        engine.load_delta(name, str(path))
    return engine


def mixed_requests(seed: int = 0) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)
    lengths, deltas = [3, 40, 1, 17, 5, 150, 12, 8, 29], [None, "a", "b"]
    return [
        Request(
            id=f"r{number}",
            prompt_ids=torch.randint(2, 258, (length,), generator=generator).tolist(),
            delta=deltas[number % 3],
            sampling=Sampling(max_tokens=NEW_TOKENS, ignore_eos=True),
        )
        for number, length in enumerate(lengths)
    ]


def run_staggered(engine: StepEngine, requests: list[Request]) -> dict[str, Output]:
    """Add a request every other step, so that prompts and decoding rows of all deltas share steps."""
    parts: dict[str, list[int]] = {request.id: [] for request in requests}
    waiting, step = iter(requests), 0
    pending = next(waiting, None)
    while engine.has_work() or pending:
        if pending and step % 2 == 0:
            engine.add(pending)
            pending = next(waiting, None)
        for output in engine.step():
            parts[output.id] += output.token_ids
        step += 1
    return {name: Output(id=name, text="", token_ids=tokens) for name, tokens in parts.items()}


def test_a_staggered_mixed_batch_equals_peft(setting: tuple[Path, dict[str, Path], Reference]) -> None:
    base, adapters, reference = setting
    engine = build(base, adapters, max_batch_tokens=32, block_size=8)
    requests = mixed_requests()
    outputs = run_staggered(engine, requests)
    for request in requests:
        assert len(outputs[request.id].token_ids) == NEW_TOKENS
        reference.check(request, outputs[request.id])
    distinct = {tuple(outputs[request.id].token_ids) for request in requests}
    assert len(distinct) == len(requests)
    assert engine.stats().blocks_used == 0


def test_the_plain_engine_gives_the_same(setting: tuple[Path, dict[str, Path], Reference]) -> None:
    base, adapters, reference = setting
    engine = HFGenerateConfig().build(str(base))
    for name, path in adapters.items():
        engine.load_delta(name, str(path))
    requests = mixed_requests(1)[:4]
    for request, output in zip(requests, engine.generate(requests), strict=True):
        reference.check(request, output)


@pytest.fixture(scope="module")
def engine(tiny_base: Path, tiny_adapters: dict[str, Path]) -> StepEngine:
    return build(tiny_base, tiny_adapters)


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "engine" in request.fixturenames:
        engine = request.getfixturevalue("engine")
        assert not engine.has_work()
        assert engine.stats().blocks_used == 0


def ask(name: str, delta: str | None = None, prompt: int = 5, **sampling: Any) -> Request:
    settings = Sampling(**({"max_tokens": 8, "ignore_eos": True} | sampling))
    return Request(id=name, prompt_ids=list(range(10, 10 + prompt)), delta=delta, sampling=settings)


def test_an_adapter_changes_the_answer_and_leaves_the_base_alone(engine: StepEngine) -> None:
    alone = engine.generate([ask("x")])[0].token_ids
    together = engine.generate([ask("a", "a"), ask("x"), ask("b", "b")])
    assert together[1].token_ids == alone
    assert len({tuple(output.token_ids) for output in together}) == 3


def test_a_cancelled_request_frees_its_blocks_and_disturbs_nobody(engine: StepEngine) -> None:
    alone = engine.generate([ask("x", "a")])[0].token_ids
    engine.add(ask("x", "a"))
    engine.add(ask("gone", "b", prompt=200, max_tokens=100))
    engine.step()
    held = engine.stats().blocks_used
    engine.cancel("gone")
    engine.cancel("never there")
    assert engine.stats().blocks_used < held
    tokens = []
    while engine.has_work():
        tokens += [token for output in engine.step() for token in output.token_ids]
    assert tokens == alone[1:]


def test_sampling_by_seed_is_the_same_in_any_company(engine: StepEngine) -> None:
    warm = {"temperature": 1.0, "seed": 3, "max_tokens": 16}
    alone = engine.generate([ask("x", "a", **warm)])[0].token_ids
    crowd = [ask("x", "a", **warm), ask("y", "b", temperature=1.5), ask("z")]
    assert engine.generate(crowd)[0].token_ids == alone
    assert engine.generate([ask("x", "a", **(warm | {"seed": 4}))])[0].token_ids != alone


def test_stop_string_ends_the_text(engine: StepEngine) -> None:
    text = engine.generate([ask("x", max_tokens=64)])[0].text
    stop = text[4:6]
    output = engine.generate([ask("x", max_tokens=64, stop=(stop,))])[0]
    assert output.finish_reason == "stop"
    assert output.text == text[: text.index(stop)]


def test_reaching_max_tokens_is_length(engine: StepEngine) -> None:
    output = engine.generate([ask("x", max_tokens=3)])[0]
    assert (output.finish_reason, len(output.token_ids)) == ("length", 3)


def test_end_of_sequence_is_stop(engine: StepEngine) -> None:
    class AlwaysEnd:
        vocab_size = 258

        def forward(self, rows: list[Any], keys: list[Any], keep: list[int]) -> torch.Tensor:
            return torch.nn.functional.one_hot(torch.tensor([0] * len(keep)), 258).float()

        def release(self, seq: Any) -> None: ...

    runner = engine._runner
    engine._runner = AlwaysEnd()  # type: ignore[assignment]
    try:
        output = engine.generate([ask("x", ignore_eos=False)])[0]
    finally:
        engine._runner = runner
    assert (output.finish_reason, output.text, output.token_ids) == ("stop", "", [0])


@pytest.mark.parametrize(
    ("request_", "status", "word"),
    [
        (ask("x", "unknown"), 404, "not loaded"),
        (Request(id="x", prompt_ids=[9] * 600), 400, "512"),
        (ask("x", max_tokens=600), 400, "512"),
        (Request(id="x", prompt_ids=[]), 400, "no token"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    engine: StepEngine, request_: Request, status: int, word: str
) -> None:
    with pytest.raises(RequestError, match=word) as caught:
        engine.add(request_)
    assert caught.value.status == status


def test_scores_are_sums_of_log_probabilities(
    engine: StepEngine, tiny_base: Path, tiny_adapters: dict[str, Path]
) -> None:
    reference = Reference(tiny_base, tiny_adapters)
    items = [
        ScoreItem(prompt_ids=list(range(5, 5 + length)), completion_ids=[9, 200, 31][:size], delta=delta)
        for length, size, delta in [(4, 3, None), (90, 1, "a"), (1, 2, "b"), (33, 3, "a")]
    ]
    for item, score in zip(items, engine.score(items), strict=True):
        ids = [*item.prompt_ids, *item.completion_ids]
        logprobs = reference.logits(ids[:-1], item.delta)[len(item.prompt_ids) - 1 :].log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(item.completion_ids)[:, None]).sum()
        assert score == pytest.approx(float(expected), abs=1e-3)


def test_deltas_come_and_go(tiny_base: Path, tiny_adapters: dict[str, Path]) -> None:
    engine = build(tiny_base, {"x": tiny_adapters["a"]})
    first = engine.generate([ask("r", "x")])[0].token_ids
    engine.add(ask("r", "x"))
    with pytest.raises(DeltaError, match="in flight"):
        engine.unload_delta("x")
    engine.cancel("r")
    with pytest.raises(DeltaError, match="already loaded"):
        engine.load_delta("x", str(tiny_adapters["b"]))
    engine.unload_delta("x")
    with pytest.raises(RequestError, match="not loaded"):
        engine.generate([ask("r", "x")])
    engine.load_delta("x", str(tiny_adapters["b"]))
    assert engine.generate([ask("r", "x")])[0].token_ids != first
    assert engine.deltas() == ["x"]


def test_what_an_earlier_owner_left_in_the_cache_does_not_matter(tiny_base: Path) -> None:
    engine = build(tiny_base, {}, prefix_cache=False)
    clean = engine.generate([ask("x", prompt=50)])[0].token_ids
    for part in (part for layer in engine._runner.cache._layers.values() for part in layer[:2]):  # type: ignore[attr-defined]
        with torch.inference_mode():
            part[: -engine.scheduler.block_size] = float("nan")
    assert engine.generate([ask("x", prompt=50), ask("y", prompt=3)])[0].token_ids == clean


def test_a_cache_that_does_not_fit_is_refused_at_load(tiny_base: Path) -> None:
    with pytest.raises(ConfigError, match="kv_cache_tokens") as caught:
        TorchEngineConfig(kv_cache_tokens=10**13, block_size=10**13).build(str(tiny_base))
    assert "\n" not in str(caught.value)


def test_the_whole_cache_is_there_before_the_first_request(tiny_base: Path) -> None:
    engine = build(tiny_base, {}, kv_cache_tokens=4096)
    layers = engine._runner.cache._layers.values()  # type: ignore[attr-defined]
    assert [part.shape[0] for layer in layers for part in layer[:2]] == [4096 + 16] * 4


def test_bfloat16_answers(tiny_base: Path, tiny_adapters: dict[str, Path]) -> None:
    engine = build(tiny_base, tiny_adapters, dtype="bfloat16")
    outputs = engine.generate([ask("x", "a"), ask("y", "b"), ask("z")])
    assert [len(output.token_ids) for output in outputs] == [8, 8, 8]


def test_ranks_of_experts_are_bounded_too(tmp_path: Path) -> None:
    base = tiny.tiny_base(tmp_path / "base", "qwen3_moe")
    adapter = tiny.random_adapter(
        base,
        tmp_path / "a",
        r=8,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={"q_proj": 2, "v_proj": 2},
    )
    build(base, {"a": adapter}, max_lora_rank=8)
    with pytest.raises(DeltaError, match=r"experts.* has rank 8, more than max_lora_rank: 4"):
        build(base, {"a": adapter}, max_lora_rank=4)

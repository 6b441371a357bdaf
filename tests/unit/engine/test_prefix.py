"""Equal beginnings are computed once, and never found by another tenant or under another delta."""

from pathlib import Path

import pytest

from ftray.engine.api import Output, Request, Sampling
from ftray.engine.blocks import BlockPool
from ftray.engine.core import StepEngine
from ftray.engine.prefix import chain_next, chain_seed
from ftray.engine.torch_engine import TorchEngineConfig
from tests.peft_reference import Reference

PROMPT = list(range(30, 75))
BLOCK = 8


@pytest.fixture
def engine(tiny_base: Path, tiny_adapters: dict[str, Path]) -> StepEngine:
    engine = TorchEngineConfig(block_size=BLOCK, kv_cache_tokens=512).build(str(tiny_base))
    for name, folder in tiny_adapters.items():
        engine.load_delta(name, str(folder))
    return engine


def ask(engine: StepEngine, delta: str | None = None, prompt: list[int] = PROMPT, **facts: str) -> Output:
    sampling = Sampling(max_tokens=8, ignore_eos=True)
    return engine.generate([Request(id="x", prompt_ids=prompt, delta=delta, sampling=sampling, **facts)])[0]  # type: ignore[arg-type]


def test_a_prompt_asked_again_is_found_up_to_its_last_token(engine: StepEngine) -> None:
    first, second = ask(engine), ask(engine)
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 40)
    assert first.token_ids == second.token_ids
    whole = ask(engine, prompt=PROMPT[:40])  # five whole blocks: the last one is computed for its logits
    assert whole.num_cached_tokens == 32
    longer = ask(engine, prompt=[*PROMPT, *first.token_ids, 3])
    assert longer.num_cached_tokens == 48
    assert engine.stats().cached_tokens == 40 + 32 + 48


def test_the_same_prompt_under_each_delta_is_right(
    engine: StepEngine, tiny_base: Path, tiny_adapters: dict[str, Path]
) -> None:
    reference = Reference(tiny_base, tiny_adapters)
    answers = []
    for delta in ("a", "b", None, "b", "a"):
        output = ask(engine, delta)
        reference.check_tokens(PROMPT, output.token_ids, delta)
        answers.append(output.num_cached_tokens)
    assert answers == [0, 0, 0, 40, 40]


def test_tenants_and_salts_find_nothing_of_each_other(engine: StepEngine) -> None:
    for delta in (None, "a"):
        assert ask(engine, delta, tenant="red").num_cached_tokens == 0
        assert ask(engine, delta, tenant="green").num_cached_tokens == 0
        assert ask(engine, delta, tenant="red", cache_salt="s").num_cached_tokens == 0
        assert ask(engine, delta, tenant="re", cache_salt="d").num_cached_tokens == 0
        assert ask(engine, delta, tenant="red").num_cached_tokens == 40


def test_a_name_that_means_another_delta_finds_nothing(
    engine: StepEngine, tiny_adapters: dict[str, Path]
) -> None:
    ask(engine, "a")
    engine.load_delta("a", str(tiny_adapters["b"]), replace=True)
    assert ask(engine, "a").num_cached_tokens == 0
    engine.load_delta("again", str(tiny_adapters["a"]))
    assert ask(engine, "again").num_cached_tokens == 40  # the same digest under another name


def test_a_shared_prefix_is_held_by_several_and_cleared_for_none(engine: StepEngine) -> None:
    alone = ask(engine)
    sampling = Sampling(max_tokens=8, ignore_eos=True)
    crowd = [Request(id=str(number), prompt_ids=PROMPT, sampling=sampling) for number in range(6)]
    outputs = engine.generate(crowd)
    assert all(output.token_ids == alone.token_ids for output in outputs)
    assert all(output.num_cached_tokens == 40 for output in outputs)
    assert engine.stats().blocks_used == 0


def test_several_answers_compute_their_prompt_once(engine: StepEngine) -> None:
    sampling = Sampling(max_tokens=6, n=4, temperature=1.0, seed=5, ignore_eos=True)
    outputs = engine.generate([Request(id="x", prompt_ids=PROMPT, sampling=sampling)])
    assert [output.index for output in outputs] == [0, 1, 2, 3]
    assert len({tuple(output.token_ids) for output in outputs}) == 4
    assert engine.stats().prompt_tokens == 45 + 3 * 5
    one = Sampling(max_tokens=6, n=2, temperature=1.0, seed=5, ignore_eos=True)
    again = engine.generate([Request(id="x", prompt_ids=PROMPT, sampling=one)])
    assert [output.token_ids for output in again] == [output.token_ids for output in outputs[:2]]


def test_kept_blocks_give_way_when_room_is_short(engine: StepEngine) -> None:
    for number in range(20):
        output = ask(engine, prompt=[number + 2, *PROMPT])
        assert output.num_cached_tokens == 0
    stats = engine.stats()
    assert (stats.blocks_used, stats.blocks_total) == (0, 64)
    assert 0 < stats.blocks_cached <= 64
    assert ask(engine, prompt=[21, *PROMPT]).num_cached_tokens == 40
    assert ask(engine, prompt=[2, *PROMPT]).num_cached_tokens == 0


def test_it_can_be_switched_off(tiny_base: Path) -> None:
    engine = TorchEngineConfig(block_size=BLOCK, prefix_cache=False, kv_cache_tokens=256).build(
        str(tiny_base)
    )
    assert [ask(engine).num_cached_tokens for _ in range(2)] == [0, 0]


def test_names_of_blocks_do_not_run_into_each_other() -> None:
    assert chain_seed(["ab", "c"]) != chain_seed(["a", "bc"])
    assert chain_seed(["a", ""]) != chain_seed(["a"])
    assert chain_next(b"x" * 16, [1, 2]) != chain_next(b"x" * 16, [2, 1])
    assert chain_next(b"x" * 16, [1, 2]) != chain_next(b"y" * 16, [1, 2])


def test_the_pool_keeps_the_beginning_longest_and_forgets_what_it_is_told() -> None:
    pool = BlockPool(4)
    names = [bytes([number]) for number in range(4)]
    blocks = pool.take(3)
    for block, name in zip(blocks, names, strict=False):
        pool.name(block, name)
    pool.give(blocks)
    assert (pool.num_free, pool.num_kept) == (4, 3)
    assert pool.find(names) == blocks
    pool.take(2)  # the free one and the last of the prefix
    assert pool.find(names) == blocks[:2]
    pool.forget(blocks[1:2])
    assert pool.find(names) == blocks[:1]
    pool.share(blocks[:1])
    pool.share(blocks[:1])
    pool.give(blocks[:1])
    assert (pool.num_kept, pool.num_free) == (0, 1)

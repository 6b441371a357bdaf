"""Memory of a rank while a model is loaded and saved: its shard and a tensor, never a second copy of the model."""

import collections
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ftray.adapt.full import Full
from ftray.config.recipe import ModelConfig
from ftray.model.build import build_structure, load_weights
from ftray.model.shard import local
from ftray.strategy.fsdp import FSDP
from ftray.testing.ranks import in_group, on_ranks

SLACK = 40 << 20
"""Code that is imported for the first time, and what allocators keep."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 134 MB whose largest tensor has 4 MB."""
    folder = tmp_path_factory.mktemp("large") / "base"
    config = AutoConfig.for_model(
        "llama",
        vocab_size=258,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def peak_above(before: int | None = None) -> int:
    """Bytes: the resident size now, beginning a new peak; or how far the peak went above an earlier one."""
    kind = "VmRSS" if before is None else "VmHWM"
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    if before is None:
        Path("/proc/self/clear_refs").write_text("5")
    return int(found[1]) * 1024 - (before or 0)


def load_and_save(folder: Path, world: int) -> dict[str, int]:
    strategy = FSDP(num_workers=world)
    model = build_structure(ModelConfig(model_name_or_path=str(folder)))
    adapt = Full()
    adapt.apply(model, 0)
    strategy.prepare(model, bf16=False)
    before = peak_above()
    load_weights(model, folder)
    parameters = dict(model.named_parameters())
    shards = [local(parameter.detach()) for parameter in parameters.values()]
    sum(shard.sum() for shard in shards)  # what is mapped is there once it is touched
    loading = peak_above(before)
    shard = sum(shard.nbytes for shard in shards)
    list(strategy.full_parameters({"first": parameters["model.norm.weight"]}))  # imports what gathering needs
    before = peak_above()
    trained = strategy.full_parameters(parameters)
    if strategy.dp_rank == 0:
        adapt.save(model, trained, folder.parent / f"saved-{world}", "base")
    collections.deque(trained, maxlen=0)
    return {"loading": loading, "shard": shard, "saving": peak_above(before)}


def on_two_ranks(folder: Path) -> dict[int, dict[str, int] | None]:
    meetings = folder.parent
    return {
        world: in_group(world, meetings / f"meet-{world}", load_and_save, folder, world) for world in (2, 1)
    }


def test_loading_holds_a_shard_and_saving_a_tensor(folder: Path) -> None:
    ranks = on_ranks(2, on_two_ranks, folder, fresh=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sizes = [parameter.nbytes for parameter in model.parameters()]
    whole, largest = sum(sizes), max(sizes)
    for world in (2, 1):
        for found in ranks[:world]:
            told = found[world]
            assert told["shard"] == pytest.approx(whole / world, rel=0.01)
            assert told["loading"] <= told["shard"] + largest + SLACK, told
            assert told["saving"] <= 4.5 * largest + SLACK, told
        saved = AutoModelForCausalLM.from_pretrained(folder.parent / f"saved-{world}")
        for (name, a), (_, b) in zip(model.named_parameters(), saved.named_parameters(), strict=True):
            assert torch.equal(a, b), name

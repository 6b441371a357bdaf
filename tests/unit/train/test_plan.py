"""What `ftray plan` says, what running out of memory says, and that both are right."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ftray.cli.main import main
from ftray.config.load import write_resolved
from ftray.core.errors import TrainError
from ftray.train.memory import step_memory
from ftray.train.oom import explained, is_out_of_memory
from ftray.train.plan import gib, lines_of, look_at_rows, plan, what_fits
from tests.recipes import MakeRecipe


def test_a_plan_in_numbers(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(adapt="full", train__max_steps=None, train__num_train_epochs=3)
    found = plan(recipe)
    # Llama of 2 layers, 258 tokens, width 64: tied, so the head adds nothing.
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128 + 2 * 64
    assert found.parameters == found.trainable == 258 * 64 + 2 * layer + 64
    rows = look_at_rows(recipe)
    assert found.steps == -(-3 * rows.per_epoch // 4) and rows.targets_fraction < 0.5
    assert found.memory.weights >= 4 * found.parameters
    # AdamW: two moments and a step for each tensor.
    assert 0 <= found.memory.optimizer - 8 * found.parameters < 1000
    assert found.checkpoint_bytes == found.memory.trained + found.memory.optimizer
    memory = found.memory
    parts = memory.weights + memory.gradients + memory.optimizer + memory.logits + memory.activations
    assert parts == memory.peak


@pytest.mark.parametrize(
    ("strategy", "said"), [("single", "peak memory: "), ("ddp", "peak memory: at least ")]
)
def test_what_several_ranks_need_is_a_lower_bound(make_recipe: MakeRecipe, strategy: str, said: str) -> None:
    [line] = [line for line in lines_of(plan(make_recipe(strategy=strategy))) if line.startswith("peak")]
    assert re.match(said + r"\d", line)


def test_small_sizes_are_not_nothing() -> None:
    assert [gib(size) for size in (3 << 29, 310 << 20, 12 << 10)] == ["1.50 GiB", "310 MiB", "12 KiB"]


def test_prompts_count_where_they_are_learnt(make_recipe: MakeRecipe) -> None:
    answers, all_of_it = (
        look_at_rows(make_recipe(objective=name)).targets_fraction for name in ("sft", "lm")
    )
    assert answers < 0.5 and all_of_it == 1.0


def test_activations_are_those_that_layers_save(make_recipe: MakeRecipe) -> None:
    """The count is linear in tokens, falls with checkpointing and bfloat16, and of LoRA only the base stays."""

    def count(num_tokens: int = 4096, bf16: bool = False, **changes: object) -> int:
        recipe = make_recipe(**changes)
        found = step_memory(recipe, num_tokens=num_tokens, num_targets=64, bf16=bf16, accumulates=False)
        return found.activations

    full = count(adapt="full")
    assert count(8192, adapt="full") / full == pytest.approx(2, rel=0.05)
    assert count(adapt="full", train__gradient_checkpointing=True) < 0.75 * full
    assert count(adapt="full", bf16=True) < 0.85 * full
    assert count(adapt={"type": "lora", "r": 4}) < 1.05 * full


def test_what_would_fit(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(adapt="full", train__per_device_train_batch_size=4)
    rows, peak = look_at_rows(recipe), plan(recipe).peak_bytes
    first, *_ = what_fits(recipe, rows, peak - 1)
    assert first.startswith("train.per_device_train_batch_size=2 (")
    assert what_fits(recipe, rows, 1000) == []


def test_the_command_needs_no_memory(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layers and vocabulary of an 8-billion-parameter model: 7 GB of weights, in a fraction of that."""
    shape = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    }
    tiny = make_recipe()
    changes = {"init": "config", "config": shape, "tokenizer_name_or_path": tiny.model.model_name_or_path}
    write_resolved(make_recipe(model=changes), tmp_path / "recipe.yaml")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    main_exits_well(["plan", str(tmp_path / "recipe.yaml"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["memory"]["weights"] > 7e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 0.5e6  # KiB


def main_exits_well(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert not ended.value.code


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
            True,
        ),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_what_counts_as_out_of_memory(make_recipe: MakeRecipe, error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) == is_one
    if is_one:
        with pytest.raises(TrainError, match=r"out of memory at .*would fit: "), explained(make_recipe()):
            raise error
    else:
        with pytest.raises(type(error), match=str(error).replace("[", "\\[")), explained(make_recipe()):
            raise error


_LIMITED = """
import resource, sys
from pathlib import Path
from ftray.cli.main import main
import torch, transformers.models.llama.modeling_llama, ftray.train.worker
torch.set_num_threads(1)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (450 << 20),) * 2)
main(["run", sys.argv[1]])
"""


@pytest.mark.slow
def test_a_real_limit_ends_in_one_line(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    shape = {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "vocab_size": 258,
    }
    rows = [{"prompt": "a" * 400, "completion": "b" * 90}] * 64
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = make_recipe(
        model={
            "init": "config",
            "config": shape,
            "tokenizer_name_or_path": make_recipe().model.model_name_or_path,
        },
        adapt="full",
        data__train=str(tmp_path / "rows.jsonl"),
        data__max_length=512,
        train__global_batch_size=16,
        train__per_device_train_batch_size=16,
        train__max_steps=2,
        data__validation=[],
    )
    write_resolved(recipe, tmp_path / "recipe.yaml")
    command = [sys.executable, "-c", _LIMITED, str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    *_, line = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert line.startswith("error: out of memory at ") and "activations" in line
    assert "would fit: train.per_device_train_batch_size=" in line

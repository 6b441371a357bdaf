"""What the DeepSpeed strategy refuses, and how it parts an optimiser's groups."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ftray.core.errors import ConfigError
from ftray.core.spec import spec
from ftray.optim.adamw import AdamW
from ftray.strategy.deepspeed import DeepSpeed
from ftray.strategy.workers import Workers
from ftray.strategy.zero import check_optimizers, split_groups
from ftray.testing import tiny
from ftray.train.check import check_model
from ftray.train.plan import Rows, plan, predict_memory
from tests.recipes import MakeRecipe


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"offload_param_device": "cpu"}, "offload_param_device: `cpu` needs zero_stage 3, not 2"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage: has a field of its own here"),
        ({"zero_stage": 4}, "zero_stage"),
    ],
)
def test_settings_that_cannot_be_are_one_line(make_recipe: MakeRecipe, settings: Any, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        make_recipe(strategy={"type": "deepspeed", **settings})


def test_what_needs_whole_matrices_is_refused_by_its_facts(make_recipe: MakeRecipe) -> None:
    for adapt, reason in (
        ("full", "orthogonalises whole matrices"),
        ("lora", "steps matrices and the rest by two"),
    ):
        with pytest.raises(ConfigError, match=f"`muon` {reason}.* with strategy `deepspeed`"):
            make_recipe(adapt=adapt, optim="muon", strategy="deepspeed")


def test_what_looks_at_more_than_an_element_is_refused() -> None:
    weights = [torch.nn.Parameter(torch.zeros(4, 4))]
    with pytest.raises(ConfigError, match="flat ranges of elements, which Adafactor cannot take"):
        check_optimizers([torch.optim.Adafactor(weights)])
    two: list[torch.optim.Optimizer] = [torch.optim.SGD(weights), torch.optim.AdamW(weights)]
    with pytest.raises(ConfigError, match="not SGD and AdamW"):
        check_optimizers(two)


@pytest.mark.parametrize("adapt", ["full", "lora"])
def test_what_it_cannot_step_is_told_by_a_check(make_recipe: MakeRecipe, adapt: str) -> None:
    """Before rows are prepared or workers start; a user's own optimiser too."""
    own = {"type": "tests.unit.strategy.test_deepspeed:Own"}
    adafactor = {"type": "torch", "optimizer": "Adafactor", "learning_rate": 1e-3}
    for optim, name in ((adafactor, "Adafactor"), (own, "Mine")):
        assert "parameters" in check_model(make_recipe(optim=optim, adapt=adapt, strategy="ddp"))
        with pytest.raises(ConfigError, match=rf"strategy: `deepspeed` steps .*{name}.*; use one of"):
            check_model(make_recipe(optim=optim, adapt=adapt, strategy="deepspeed"))
    assert "parameters" in check_model(make_recipe(adapt=adapt, strategy="deepspeed"))


def test_each_stage_says_what_it_divides() -> None:
    divided = [DeepSpeed(zero_stage=stage).shards - {"masters"} for stage in (1, 2, 3)]
    assert divided == [{"optimizer"}, {"optimizer", "gradients"}, {"optimizer", "gradients", "weights"}]
    assert all("masters" in DeepSpeed(zero_stage=stage).shards for stage in (1, 2, 3))


def test_a_plan_divides_by_stage(make_recipe: MakeRecipe, tiny_base: Path) -> None:
    """Of four workers each holds a quarter of what its stage divides, and never more than under `ddp`."""
    rows = Rows(per_epoch=100, mean_tokens=64.0, micro_batch_tokens=128, targets_fraction=1.0)
    stages = [{"type": "deepspeed", "zero_stage": stage, "num_workers": 4} for stage in (1, 2, 3)]
    config = {**tiny.ARCHITECTURES["llama"], "vocab_size": 258, "num_hidden_layers": 6}
    model = {"init": "config", "config": config, "tokenizer_name_or_path": str(tiny_base)}
    whole, one, two, three = (
        predict_memory(make_recipe(adapt="full", model=model, strategy=strategy), rows)[1]
        for strategy in ({"type": "ddp", "num_workers": 4}, *stages)
    )
    assert [m.optimizer for m in (one, two, three)] == [(whole.optimizer + whole.trained) // 4] * 3
    assert (one.gradients, two.gradients) == (whole.gradients, whole.gradients // 4)
    assert one.weights == two.weights == whole.weights > three.weights
    assert whole.peak > one.peak >= two.peak > three.peak
    lora = [
        predict_memory(make_recipe(adapt="lora", model=model, strategy=strategy), rows)[1]
        for strategy in ({"type": "fsdp", "num_workers": 4}, stages[1])
    ]
    assert lora[1].optimizer == (lora[0].optimizer + lora[0].trained) // 4, (
        "factors are whole, their state is not"
    )


def test_a_strategy_that_does_not_say_what_it_divides(make_recipe: MakeRecipe) -> None:
    """A user's own may not; a plan that took it for `ddp` would be wrong in silence."""
    with pytest.raises(ConfigError, match=r"strategy: `Silent` does not say what it divides; .*`shards`"):
        plan(make_recipe(strategy={"type": "tests.unit.strategy.test_deepspeed:Silent"}))


@spec
class Silent(Workers):
    """A user's strategy that says too little."""


@spec
class Own:
    """A user's optimiser of another library's kind."""

    learning_rate: float = 1e-3

    def build(self, parameters: Mapping[str, torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
        return [Mine(list(parameters.values()), {})]


class Mine(torch.optim.Optimizer):
    """Nothing that DeepSpeed knows."""


def test_adafactor_on_flat_ranges_is_another_method() -> None:
    """Why it is refused: its second moments are rows and columns of a matrix, which a range does not have."""
    start, gradient = torch.ones(4, 4), torch.arange(16.0).reshape(4, 4)

    def stepped(shape: tuple[int, ...]) -> torch.Tensor:
        weight = torch.nn.Parameter(start.clone().reshape(shape))
        weight.grad = gradient.reshape(shape)
        torch.optim.Adafactor([weight], lr=0.1).step()
        return weight.detach().reshape(4, 4)

    assert not torch.allclose(stepped((4, 4)), stepped((16,)), rtol=1e-3)


def test_groups_are_parted_without_a_change_of_settings() -> None:
    weights = {f"w{n}": torch.nn.Parameter(torch.zeros(10, 10)) for n in range(5)}
    weights["norm"] = torch.nn.Parameter(torch.zeros(10))
    (optimizer,) = AdamW(weight_decay=0.1).build(weights)
    split_groups(optimizer, elements=250)
    groups = optimizer.param_groups
    assert [[p.numel() for p in group["params"]] for group in groups] == [[100, 100], [100, 100], [100], [10]]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.1, 0.0]


def test_without_the_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from ftray.strategy.zero import load_deepspeed

    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"deepspeed is not installed.*ftray\[deepspeed\]"):
        load_deepspeed()


def test_a_spec_says_how_it_is_set(make_recipe: MakeRecipe) -> None:
    section = DeepSpeed(zero_stage=3, zero_optimization={"reduce_bucket_size": 1000}).settings()
    assert (section["stage"], section["reduce_bucket_size"]) == (3, 1000)

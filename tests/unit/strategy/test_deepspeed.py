"""What the DeepSpeed strategy refuses, and how it parts an optimiser's groups."""

from typing import Any

import pytest
import torch

from ftray.core.errors import ConfigError
from ftray.optim.adamw import AdamW
from ftray.strategy.deepspeed import DeepSpeed
from ftray.strategy.zero import check_optimizers, split_groups
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

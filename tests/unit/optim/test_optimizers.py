"""Parameter groups, weight decay and the optimisers of torch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

from ftray.core.errors import ConfigError
from ftray.core.spec import build_piece, dump
from ftray.optim.groups import is_decayed
from ftray.optim.library import offered
from ftray.strategy import pieces
from ftray.testing import tiny

Parameters = dict[str, torch.nn.Parameter]


def parameters(seed: int = 0) -> Parameters:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "embed.weight": (6, 4),
        "layers.0.up.weight": (8, 4),
        "layers.0.up.bias": (8,),
        "norm.weight": (4,),
    }
    return {name: torch.nn.Parameter(torch.randn(s, generator=generator)) for name, s in shapes.items()}


def descend(named: Parameters, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
    for step in steps:
        for name, parameter in named.items():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step + len(name)))
            parameter.grad = parameter.detach() + 0.1 * noise
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_weight_decay_spares_what_transformers_spares(architecture: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.tiny_base(tmp_path, architecture))
    ours = {name for name, parameter in model.named_parameters() if is_decayed(name, parameter)}
    theirs = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    assert ours == theirs & dict(model.named_parameters()).keys() and ours


@pytest.mark.parametrize(
    "optim", ["adamw", "muon", {"type": "torch", "optimizer": "NAdam", "learning_rate": 1e-3}]
)
def test_rates_and_decays_by_pattern(optim: Any) -> None:
    settings = {"type": optim} if isinstance(optim, str) else optim
    rules = [
        {"pattern": "*.bias", "learning_rate": 0.5},
        {"pattern": "layers.0.*", "learning_rate": 0.25, "weight_decay": 0.3},
    ]
    piece = build_piece("optim", settings | {"weight_decay": 0.1, "param_groups": rules})
    named = parameters()
    found = {}
    for group in (group for optimizer in piece.build(named) for group in optimizer.param_groups):
        for parameter in group["params"]:
            (name,) = (name for name, known in named.items() if known is parameter)
            found[name] = (group["lr"], group["weight_decay"])
    assert found.keys() == named.keys()
    assert found["layers.0.up.bias"] == (0.5, 0.0) and found["layers.0.up.weight"] == (0.25, 0.3)
    assert found["norm.weight"][1] == 0.0 and found["norm.weight"][0] not in (0.5, 0.25)
    assert build_piece("optim", dump(piece)) == piece


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["layers.0.upp.*"],
            r"param_groups\.0\.pattern: 'layers\.0\.upp\.\*' matches no .*near: layers\.0\.up\.",
        ),
        (["*", "norm.*"], "param_groups.1.pattern: .*an earlier pattern takes all it matches"),
        (["*a" * 40 + "b"], "matches no parameter"),
    ],
)
def test_a_pattern_that_matches_nothing(patterns: list[str], message: str) -> None:
    piece = build_piece("optim", {"type": "adamw", "param_groups": [{"pattern": p} for p in patterns]})
    named = parameters() | {"a" * 60: torch.nn.Parameter(torch.zeros(1))}
    with pytest.raises(ConfigError, match=message):
        piece.build(named)


@pytest.mark.parametrize("name", [*offered(), "sgd with momentum"])
def test_every_torch_optimizer_goes_on_from_its_saved_state(name: str, tmp_path: Path) -> None:
    settings = {"momentum": 0.9, "nesterov": True} if name == "sgd with momentum" else {}
    optimizer = "SGD" if settings else name
    piece = build_piece(
        "optim", {"type": "torch", "optimizer": optimizer, "learning_rate": 0.01, "settings": settings}
    )
    whole, parts, again = parameters(), parameters(), parameters(1)
    descend(whole, piece.build(whole), range(6))
    first, second = piece.build(parts), piece.build(again)
    descend(parts, first, range(3))
    files = pieces.take(parts, first, rank=0, num_writers=1, copy=True).write(tmp_path)
    pieces.restore(tmp_path, {"layout": pieces.LAYOUT, "files": files}, again, second)
    descend(again, second, range(3, 6))
    for key in whole:
        assert torch.equal(again[key], whole[key]), key
        assert not torch.equal(whole[key], parameters()[key]), key


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "nadamm"}, "did you mean `NAdam`"),
        ({"optimizer": "LBFGS"}, "is not an optimiser of torch.optim"),
        (
            {"optimizer": "SGD", "settings": {"momentun": 0.9}},
            r"settings\.momentun: SGD has no such argument",
        ),
        ({"optimizer": "SGD", "settings": {"momentum": -1}}, "SGD refuses them: Invalid momentum value"),
        ({"optimizer": "Rprop", "weight_decay": 0.1}, "Rprop has none"),
    ],
)
def test_mistakes_in_a_torch_optimizer(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_piece("optim", {"type": "torch", "learning_rate": 0.1, **settings})

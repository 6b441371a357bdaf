"""Engines that share a model: together they are what each is alone."""

from pathlib import Path

import pytest
import torch

from ftray.adapt.lora import LoRA
from ftray.data.batch import Batch, collate
from ftray.model.build import load_model
from ftray.model.policy import Policy
from ftray.objective.base import Objective
from ftray.objective.dpo import DPO
from ftray.objective.lm import SupervisedFineTuning
from ftray.optim.adamw import AdamW
from ftray.optim.first_order import FirstOrder, StepReport, Work, step_together
from ftray.strategy.single import Single

SETTINGS = [(4, 0.0, 1e-2, 1.0), (2, 0.3, 1e-3, None), (8, 0.1, 3e-2, 0.1), (3, 0.0, 1e-2, 1.0)]
"""Rank, dropout, learning rate and clip of each."""


def batch(seed: int, lengths: list[int]) -> Batch:
    """Random documents; preference pairs if there are two of them."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(0, 256, (2 * length,), generator=generator).numpy()
        labels = ids.copy()
        labels[[0, length]] = -100
        weights = (labels >= 0).astype("float32")
        docs, groups = torch.tensor([length, length]).numpy(), torch.tensor([2]).numpy()
        rows.append((ids, labels, weights, docs, groups))
    return collate(rows, list(range(len(rows))))


def engines(
    base: Path, objective: Objective, chosen: list[int], checkpointed: bool = False
) -> list[FirstOrder]:
    """Engines of some of the settings over one model of their own."""
    model = load_model(base)
    model.requires_grad_(False)
    made = []
    for number in chosen:
        rank, dropout, rate, clip = SETTINGS[number]
        name = f"m{number}"
        LoRA(r=rank, lora_dropout=dropout).apply(model, seed=number, name=name)
        mine = {n: p for n, p in model.named_parameters() if n.endswith(f".{name}")}
        optimizers = AdamW(learning_rate=rate, weight_decay=0.1).build(mine)
        made.append((objective, mine, optimizers, clip, name))
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    policy = Policy(model.train())
    return [
        FirstOrder(policy, o, Single(), mine, optimizers, max_grad_norm=clip, adapter=name)
        for o, mine, optimizers, clip, name in made
    ]


def rows_of(number: int, step: int) -> list[Batch]:
    """Micro batches of other sizes and another number for each engine."""
    sizes = [[[5, 3], [4]], [[9]], [[2, 2, 2], [7], [3]], [[6, 4]]][number]
    return [batch(100 * number + 10 * step + place, lengths) for place, lengths in enumerate(sizes)]


def work(engine: FirstOrder, number: int, step: int) -> Work:
    return Work(engine, rows_of(number, step), 1.0 - 0.2 * step, f"{number}-{step}")


@pytest.mark.parametrize("objective", [SupervisedFineTuning(), DPO()], ids=["sft", "dpo"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
def test_each_is_what_it_is_alone(tiny_base: Path, objective: Objective, checkpointed: bool) -> None:
    """Losses, norms and weights over steps of ragged batches, with dropout, to rounding."""
    every = list(range(len(SETTINGS)))
    together = engines(tiny_base, objective, every, checkpointed)
    alone = [engines(tiny_base, objective, [number], checkpointed)[0] for number in every]
    for step in range(3):
        most_rows = (None, 2, 1)[step]  # all in one pass, some, each in its own
        found = step_together([work(together[number], number, step) for number in every], most_rows)
        for number in every:
            own = work(alone[number], number, step)
            _equal(found[number], alone[number].step(own.batches, own.scale, own.noise))
    for one, other in zip(together, alone, strict=True):
        for name, parameter in one.parameters.items():
            torch.testing.assert_close(parameter, other.parameters[name], rtol=1e-5, atol=1e-5)


def _equal(one: StepReport, other: StepReport) -> None:
    assert one.loss == pytest.approx(other.loss, rel=1e-5)
    assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
    assert (one.tokens, one.targets, one.num_targets) == (other.tokens, other.targets, other.num_targets)
    assert one.squared_lengths == other.squared_lengths and one.applied == other.applied
    assert dict(one.terms) == pytest.approx(dict(other.terms), rel=1e-4, abs=1e-6)


def test_dropout_depends_on_key_micro_batch_and_layer(tiny_base: Path) -> None:
    """The same key gives the same loss whatever PyTorch's generator has done; another one another."""

    def loss(noise: str, seed: int) -> float:
        (engine,) = engines(tiny_base, SupervisedFineTuning(), [1])
        for name, parameter in engine.parameters.items():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.1)
        torch.manual_seed(seed)
        return engine.step([batch(0, [9])], 1.0, noise).loss

    assert loss("a", 0) == loss("a", 1) != loss("b", 0)
    assert loss("", 0) == loss("", 0) != loss("", 1)


def test_one_that_is_not_finite_stops_nobody_else(tiny_base: Path) -> None:
    group, alone = (engines(tiny_base, SupervisedFineTuning(), [0, 3]) for _ in range(2))
    bad = next(iter(group[0].parameters.values()))
    with torch.no_grad():
        bad[0, 0] = torch.nan
    broken, sound = step_together([work(engine, n, 0) for engine, n in zip(group, (0, 3), strict=True)])
    _equal(sound, alone[1].step(rows_of(3, 0), 1.0, "3-0"))
    assert sound.applied and not broken.applied

"""`ftray check --equivalence`: a sound recipe passes, one whose loss depends on how rows are cut is named."""

import json
import sys
from collections.abc import Mapping
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch

from ftray.cli.main import main
from ftray.config.load import write_resolved
from ftray.core.spec import spec
from ftray.data.batch import Batch
from ftray.model.policy import Policy
from ftray.objective.lm import SupervisedFineTuning
from ftray.train.equivalence import Difference, LeftOut, largest_difference, losses_of, table, variants_of
from tests.recipes import MakeRecipe


@spec
class MeanOfMeans(SupervisedFineTuning):
    """The classic mistake: every micro batch counts the same, however many targets it has."""

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"nll": 1.0}

    def sums(self, policy: Policy, batch: Batch) -> Mapping[str, torch.Tensor]:
        total = super().sums(policy, batch)["nll"]
        return {"nll": total / max(1.0, super().weights(batch)["nll"])}


def check(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["check", str(path), "--equivalence"])
    code = ended.value.code
    return int(code or 0), capsys.readouterr().out


@pytest.mark.slow
def test_sound(make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_resolved(make_recipe(adapt__lora_dropout=0.1), tmp_path / "recipe.yaml")
    code, text = check(tmp_path / "recipe.yaml", capsys)
    assert code == 0, text
    for name in (
        "micro batches of 1",
        "packing off: each document alone",
        "ddp, 1 worker",
        "ddp, 2 workers",
        "deepspeed, 2 workers",
        "fsdp, 2 workers",
    ):
        assert name in text
    assert "differs" not in text and text.rstrip().endswith("ok")


@pytest.mark.parametrize(
    ("losses", "reference"),
    [([1.0, nan], [1.0, 1.0]), ([1.0, 1.0], [1.0, nan]), ([1.0, nan], [1.0, nan]), ([inf, 1.0], [inf, 1.0])],
)
def test_what_is_not_finite_differs(losses: list[float], reference: list[float]) -> None:
    relative = largest_difference(losses, reference)
    assert relative == inf
    row = Difference("spread", relative, losses)
    assert "spread  inf  <- differs" in table([row, row])[1]


def test_the_other_strategies_are_tried_where_they_go_with_the_rest(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spread(**changes: Any) -> list[str]:
        variants, left_out = variants_of(make_recipe(**changes))
        found = [v for v in variants if not v.recipe.strategy.in_process]
        assert all(v.recipe.strategy.num_workers == v.world for v in found)
        names = [v.name for v in found]
        assert not set(names) & {row.name for row in left_out}
        reasons.update({row.name: row.reason for row in left_out})
        return names

    reasons: dict[str, str] = {}

    ddp, fsdp = ["ddp, 1 worker", "ddp, 2 workers"], ["fsdp, 1 worker", "fsdp, 2 workers"]
    zero = "deepspeed, 2 workers"
    assert spread() == [*ddp, zero, fsdp[1]] and not reasons
    assert spread(strategy={"type": "fsdp", "num_workers": 4}) == [*fsdp, ddp[1], zero]
    assert spread(adapt="full", optim="muon") == ddp, "Muon needs whole matrices"
    assert "`muon`" in reasons[fsdp[1]] and "`deepspeed`" in reasons[zero]
    row = Difference("micro batches of 1", 0.0, [1.0])
    shown = table([row, row], [LeftOut(fsdp[1], reasons[fsdp[1]])])
    assert shown[2].split(maxsplit=3) == ["fsdp,", "2", "workers", f"left out: {reasons[fsdp[1]]}"]
    adafactor = {"type": "torch", "optimizer": "Adafactor", "learning_rate": 1e-3}
    assert zero not in spread(optim=adafactor), "it cannot step ranges"
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert spread() == [*ddp, fsdp[1]], "its library is not there"
    assert "deepspeed" in reasons[zero] and "\n" not in reasons[zero]


@pytest.mark.parametrize("packing", [True, False])
def test_unsound(make_recipe: MakeRecipe, tmp_path: Path, packing: bool) -> None:
    """In this process alone: what must be told apart, is."""
    rows = [{"prompt": f"{i}:", "completion": "abcdefg" * (1 + i % 5)} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    objective = {"type": "tests.dist.test_equivalence:MeanOfMeans"}
    files = {"data__train": str(tmp_path / "rows.jsonl"), "data__validation": []}
    recipe = make_recipe(objective=objective, data__packing=packing, **files)
    reference, *others = [variant for variant in variants_of(recipe)[0] if variant.recipe.strategy.in_process]
    curve = losses_of(reference.recipe, reference.rows, 3)
    names = []
    for variant in others:
        found = losses_of(variant.recipe, variant.rows, 3)
        names.append(variant.name)
        difference = Difference(variant.name, largest_difference(found, curve), found)
        assert difference.relative > 1e-3 and "<- differs" in table([difference, difference])[1]
    packed = "off: each document alone" if packing else "on: documents joined to rows"
    assert names == ["micro batches of 1 instead of 2", f"packing {packed}"]

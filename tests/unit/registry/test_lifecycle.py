"""The life of a delta: trained, evaluated, published, resolved, loaded by other tools, traced back."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ftray.config.recipe import Recipe
from ftray.core.errors import DeltaError, RegistryError
from ftray.core.spec import dump, parse
from ftray.data.read import Shards
from ftray.data.tokenise import Tokeniser
from ftray.delta import manifest
from ftray.engine.torch_engine import TorchEngineConfig
from ftray.eval.metrics import ExactMatch
from ftray.eval.questions import read_answers, read_questions
from ftray.eval.rank import load_scorer
from ftray.eval.run import evaluate
from ftray.model.identity import base_identity
from ftray.registry.lineage import saw
from ftray.registry.registry import Registry
from ftray.testing import tiny
from ftray.train.io import LocalIO
from ftray.train.worker import train
from tests.recipes import MakeRecipe

IDS = torch.randint(2, 250, (1, 20), generator=torch.Generator().manual_seed(1))


def peft_logits(base: Path, folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        logits: torch.Tensor = PeftModel.from_pretrained(model, str(folder)).eval()(IDS).logits
    return logits


def test_lineage_is_complete(
    make_recipe: MakeRecipe, tiny_base: Path, corpus: dict[str, Path], tmp_path: Path
) -> None:
    recipe = make_recipe(train__max_steps=60, train__global_batch_size=8)
    io = LocalIO(tmp_path / "runs" / recipe.name)
    result = train(recipe, io)
    assert result.delta is not None

    engine = TorchEngineConfig().build(str(tiny_base))
    engine.load_delta("candidate", str(result.delta))
    tok = Tokeniser(str(tiny_base))
    report = evaluate(
        engine,
        read_questions([str(corpus["validation"])], tok),
        ["candidate"],
        ExactMatch(),
        train_answers=read_answers([str(corpus["train"])]),
        tokeniser=tok,
        scorer=load_scorer(str(tiny_base)),
        max_tokens=8,
    )
    assert report.beats_all("candidate"), report.to_json()["results"]

    registry = Registry(tmp_path / "registry")
    accuracy = report.result("candidate").interval.estimate
    entry = registry.publish(result.delta, "letters", metrics={"exact_match": accuracy}, aliases=["prod"])
    found = registry.resolve("letters@prod")
    assert found.ref == entry.ref == "letters@1"

    assert torch.equal(peft_logits(tiny_base, found.path), peft_logits(tiny_base, result.delta))
    engine.load_delta("published", str(found.path))

    delta = found.delta
    manifest.check_base(delta, base_identity(tiny_base))
    assert parse(Recipe, delta.recipe) == recipe and delta.recipe == dump(recipe)
    assert delta.lineage.data == [Shards(io.prepare(recipe)[0]).digest]
    assert delta.lineage.run == recipe.name
    assert [witness.entry.ref for witness in saw(registry, corpus["train"].name)] == ["letters@1"]
    assert [witness.entry.ref for witness in saw(registry, str(corpus["train"]))] == ["letters@1"]
    assert delta.metrics == {**result.metrics, "exact_match": accuracy}


def test_delta_of_another_base_is_refused_by_name(
    tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    other = tiny.tiny_base(tmp_path / "other", seed=5)
    folder = tmp_path / "delta"
    folder.mkdir()
    for file in tiny_adapters["a"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    manifest.write(folder, kind="low_rank", base=base_identity(other))
    entry = Registry(tmp_path / "registry").publish(folder, "tone")
    with pytest.raises(DeltaError, match="belongs to base other"):
        TorchEngineConfig().build(str(tiny_base)).load_delta("tone", str(entry.path))


def test_damage_in_the_registry_never_reaches_an_engine(
    tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "delta"
    folder.mkdir()
    for file in tiny_adapters["b"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    manifest.write(folder, kind="low_rank", base=base_identity(tiny_base))
    registry = Registry(tmp_path / "registry")
    path = registry.publish(folder, "tone").path / "adapter_model.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 0x40
    path.write_bytes(damaged)
    with pytest.raises(RegistryError, match=r"adapter_model\.safetensors"):
        registry.resolve("tone")
    with pytest.raises(DeltaError, match=r"adapter_model\.safetensors"):
        TorchEngineConfig().build(str(tiny_base)).load_delta("tone", str(path.parent))

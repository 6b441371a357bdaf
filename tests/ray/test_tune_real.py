"""A search over a real, tiny model through the command line, to a published delta that plain `peft` loads."""

import json
from pathlib import Path

import pytest
import yaml

from ftray.cli.main import main
from ftray.config.load import load
from ftray.config.tune import TuneConfig
from ftray.core.spec import replace
from ftray.registry.registry import Registry
from ftray.tune.journal import read
from ftray.tune.ray_trials import run

pytestmark = pytest.mark.ray


def write_search(folder: Path, base: Path) -> Path:
    rows = [{"prompt": f"question {i}", "completion": " " + "ab"[i % 2] * 6} for i in range(40)]
    for name, part in (("train", rows[:32]), ("validation", rows[32:])):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in part))
    recipe = {
        "name": "tiny",
        "model": {"model_name_or_path": str(base)},
        "data": {
            "train": "train.jsonl",
            "validation": "validation.jsonl",
            "max_length": 64,
            "cache_dir": "cache",
        },
        "adapt": {"type": "lora", "r": 4},
        "objective": "sft",
        "optim": "adamw",
        "lr_scheduler": "constant",
        "strategy": {"type": "ddp", "num_workers": 2},
        "train": {"num_train_epochs": 1, "global_batch_size": 4},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    search = {
        "name": "search",
        "recipe": "recipe.yaml",
        "space": {"optim.learning_rate": {"loguniform": [1e-3, 3e-2]}, "adapt.r": {"choice": [2, 8]}},
        "num_members": 2,
        "num_segments": 2,
        "segment_steps": 4,
    }
    (folder / "tune.yaml").write_text(yaml.safe_dump(search))
    return folder / "tune.yaml"


@pytest.mark.slow
def test_segments_of_several_workers_are_those_of_one(ray_cluster, tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load(TuneConfig, write_search(tmp_path, tiny_base))
    alone = run(replace(config, "max_concurrent", 1))
    spread = replace(replace(config, "spread", True), "name", "spread")
    spread = replace(replace(spread, "max_concurrent", 1), "overrides", ["strategy.cpus_per_worker=0.9"])
    both = run(spread)
    assert both.num_segments == alone.num_segments == 4 and both.num_failures == 0
    scores = [[r["score"] for r in read(result.journal) if r["kind"] == "commit"] for result in (alone, both)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)
    saved = list((both.folder / "segments").glob("*/progress/rank-1.json"))
    assert len(saved) == 4, "each segment had two workers"


def test_search_and_publish(ray_cluster, tiny_base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # the recipe's relative paths hold in the actors too
    write_search(tmp_path, tiny_base)
    with pytest.raises(SystemExit) as ended:
        main(["tune", "tune.yaml", "--publish", "best", "--registry", "registry"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 exploits, 1 perturbations" in shown and "published best@1" in shown
    result = json.loads(Path("runs/search/tune_result.json").read_text())
    commits = [record for record in read(Path("runs/search/journal.jsonl")) if record["kind"] == "commit"]
    assert len(commits) == 4 and all(record["metrics"]["eval_loss"] > 0 for record in commits)
    assert result["score"] < commits[0]["score"]

    entry = Registry("registry").resolve("best")
    assert entry.delta.metrics["eval_loss"] == pytest.approx(result["score"])
    assert json.loads((entry.path / "adapter_config.json").read_text())["r"] == result["config"]["adapt.r"]

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), str(entry.path))
    assert any("lora_B" in name and value.abs().sum() > 0 for name, value in model.named_parameters())

"""A search over a real, tiny model in this process; its winner trained again alone; its report."""

import json

import pytest
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ftray.cli.main import main
from ftray.config.load import load, write_resolved
from ftray.config.recipe import Recipe
from ftray.config.tune import TuneConfig
from ftray.core.errors import TuneError
from ftray.core.spec import parse
from ftray.registry.registry import Registry
from ftray.tune.local import run_local
from ftray.tune.members import members
from ftray.tune.replay import replay_schedule
from ftray.tune.report import report


@pytest.fixture
def searched(make_recipe, tmp_path):
    """A finished population of two, exploited once."""
    recipe = make_recipe("tiny")
    settings = {
        "name": "search",
        "output_dir": str(tmp_path),
        "recipe": "recipe.yaml",
        "space": {"optim.learning_rate": {"loguniform": [1e-3, 3e-2]}, "adapt.r": {"choice": [2, 4]}},
        "num_members": 2,
        "num_segments": 2,
        "segment_steps": 3,
    }
    result = run_local(parse(TuneConfig, settings), recipe)
    assert result.cost.tokens > 0 and result.cost.cpu_s > 0
    return result.folder


def test_the_winner_alone_its_curve_its_report_and_its_lineage(searched, tmp_path, capsys):
    found = replay_schedule(searched / "journal.jsonl", tmp_path / "again")
    assert found.equal is True and found.score == found.recorded_score
    written = report(searched)
    winner = written.result
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (found.delta, winner.delta))
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)
    assert any(value.abs().sum() > 0 for name, value in ours.items() if "lora_B" in name)

    view = members(searched)[winner.member]
    assert [record["step"] for record in view.curve if "grad_norm" in record] == list(range(1, 7))
    assert [record["eval_loss"] for record in view.curve if "eval_loss" in record][-1] == winner.score

    names = {path.name for path in written.files}
    pictures = {"lineage.png", "schedules.png", "curves.png", "parallel.png"}
    assert names == pictures | {"best.yaml", "tune_result.json"}
    assert all((searched / "report" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    events = EventAccumulator(str(searched / "report" / "members" / f"m{winner.member:03}" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("grad_norm")] == list(range(1, 7))
    best = load(Recipe, searched / "report" / "best.yaml", [])
    assert best.train.max_steps == 6 and best.name == "search-best"
    assert best.optim.learning_rate == winner.config["optim.learning_rate"]
    assert winner.cost.segments == 4 and winner.cost.saved == 0 and winner.cost.tokens > 0

    registry = str(tmp_path / "registry")
    with pytest.raises(SystemExit) as ended:
        main(["tune", "report", str(searched), "--publish", "best", "--registry", registry])
    assert not ended.value.code and "published best@1" in capsys.readouterr().out
    published = Registry(registry).resolve("best").delta
    assert published.parity is not None and published.parity.served_difference < 1e-3
    lineage = published.lineage
    assert [step["checkpoint"] for step in lineage.segments] == [
        step["checkpoint"] for step in winner.schedule
    ]
    first = json.loads(
        (searched / "segments" / winner.schedule[0]["checkpoint"] / "segment.json").read_text()
    )
    assert lineage.parents == [first["delta_digest"]] and lineage.parents[0].startswith("sha256:")


def test_what_cannot_be_replayed_or_reported_is_one_line(tmp_path, capsys):
    with pytest.raises(TuneError, match="no such journal"):
        replay_schedule(tmp_path / "journal.jsonl")
    for words in (["report", str(tmp_path)], ["replay", str(tmp_path / "journal.jsonl")], ["no.yaml"]):
        with pytest.raises(SystemExit) as ended:
            main(["tune", *words])
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_a_search_that_can_never_report_its_metric_is_refused_at_once(make_recipe, tmp_path, capsys):
    recipe = make_recipe("tiny", data__validation=[])
    write_resolved(recipe, tmp_path / "recipe.yaml")
    settings = {
        "name": "search",
        "output_dir": str(tmp_path / "runs"),
        "recipe": str(tmp_path / "recipe.yaml"),
        "space": {"optim.learning_rate": {"loguniform": [1e-3, 3e-2]}},
    }
    cases = {
        "'eval_loss' is never reported": {},
        "did you mean `optim.learning_rate`": {"space": {"optim.lr": {"uniform": [0, 1]}}},
        "is empty": {"space": {"optim.learning_rate": {"uniform": [1, 1]}}},
        "space.optim": {"space": {"optim": {"choice": ["adamw", "adam"]}}},
    }
    for words, changes in cases.items():
        (tmp_path / "tune.yaml").write_text(yaml.safe_dump({**settings, **changes}))
        with pytest.raises(SystemExit) as ended:
            main(["tune", str(tmp_path / "tune.yaml")])
        told = capsys.readouterr().err
        assert ended.value.code == 2 and words in told and told.count("\n") == 1, told
    assert not (tmp_path / "runs").exists()

"""Evaluation from questions to report: over an engine without a model, and over a real tiny one."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from ftray.cli.main import main
from ftray.core.errors import DataError, DeltaError, RegistryError
from ftray.data.tokenise import Tokeniser
from ftray.engine.fake import FakeEngineConfig
from ftray.engine.torch_engine import TorchEngineConfig
from ftray.eval import rank
from ftray.eval.metrics import ExactMatch
from ftray.eval.questions import Question, Questions, answer_ids, read_questions
from ftray.eval.report import BASE, CONSTANT, RANKING, difference_table, score_table
from ftray.eval.run import delta_folders, evaluate, rank_answers
from ftray.registry.registry import Registry
from ftray.testing.deltas import weights_delta

EXPECTED = ["tone"] * 60 + ["json"] * 25 + ["time"] * 15


def asked(expected: list[str], prompt_tokens: int = 5) -> Questions:
    return Questions(
        [Question([1] * prompt_tokens, text, file="f", offset=i) for i, text in enumerate(expected)]
    )


def fake(**settings: object) -> object:
    """An engine whose base says `base` and whose delta says its own name."""
    engine = FakeEngineConfig(text=" {model}", **settings).build("base")
    engine.load_delta("tone@1", "folder/tone")
    return engine


def test_report_counts_what_was_said() -> None:
    train = ["json", "json", "tone"]
    report = evaluate(fake(), asked(EXPECTED), ["tone@1"], ExactMatch(), train_answers=train)
    assert [result.model for result in report.results] == [BASE, CONSTANT, "tone@1"]
    assert [sum(result.scores) for result in report.results] == [0, 25, 60]
    assert report.constant == "json" and report.metric == "exact_match" and not report.notes
    tuned = report.result("tone@1").interval
    assert tuned.estimate == 0.6 and tuned.low == pytest.approx(0.502, abs=1e-3)
    margins = {item.minus: item.interval for item in report.differences}
    assert margins[BASE].estimate == pytest.approx(0.6) and margins[CONSTANT].estimate == pytest.approx(0.35)
    assert report.beats_all("tone@1")


def test_a_delta_no_better_than_the_constant_does_not_beat_it() -> None:
    report = evaluate(fake(), asked(EXPECTED), ["tone@1"], ExactMatch(), train_answers=["tone"])
    difference = next(item for item in report.differences if item.minus == CONSTANT)
    assert difference.interval.estimate == 0 and not difference.interval.excludes_zero
    assert not report.beats_all("tone@1") and not report.beats_all("unknown")


def test_report_as_json_and_tables() -> None:
    report = evaluate(fake(), asked(EXPECTED), ["tone@1"], ExactMatch())
    data = json.loads(json.dumps(report.to_json()))
    assert data["rows"] == 100 and data["results"][2]["correct"] == 60
    assert data["differences"][0]["excludes_zero"] is True
    assert data["answers"]["tone@1"] == [" tone"] * 100 and data["answers"]["expected"] == EXPECTED
    assert "test rows themselves" in data["notes"][0]
    console = Console(width=120, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(score_table(report))
    console.print(difference_table(report.differences))
    text = console.export_text()
    assert "best constant answer ('tone')" in text and "0.502 to 0.691" in text and "+0.600" in text


def test_progress_runs_over_all_models() -> None:
    seen: list[tuple[int, int | None]] = []
    evaluate(fake(), asked(EXPECTED), ["tone@1"], ExactMatch(), progress=lambda *at: seen.append(at))
    assert seen[-1] == (200, 200)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_too_long_prompts_are_counted_not_asked() -> None:
    engine = fake(max_length=64)
    short, long = asked(["tone"] * 3), asked(["tone"], prompt_tokens=40)
    mixed = Questions([*short.items, *long.items], [{"file": "f", "offset": 9, "reason": "not JSON"}])
    report = evaluate(engine, mixed, ["tone@1"], ExactMatch(), max_tokens=32)
    assert len(report.expected) == 3
    assert [bad["reason"][:10] for bad in report.quarantined] == ["not JSON", "its prompt"]
    with pytest.raises(DataError, match="no row can be asked"):
        evaluate(engine, long, [], ExactMatch(), max_tokens=32)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for name, count in (("train", 12), ("test", 9)):
        answers = ["json", "time", "os"]
        lines = [{"prompt": f"{name} {i} ->", "completion": f" {answers[i % 3]}"} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_ranking_by_the_engine_and_by_the_model_agree(
    tiny_base: Path, tiny_adapters: dict[str, Path], rows: Path
) -> None:
    tok = Tokeniser(str(tiny_base))
    questions = read_questions([str(rows / "test.jsonl")], tok).items
    engine = TorchEngineConfig().build(str(tiny_base))
    engine.load_delta("a", str(tiny_adapters["a"]))
    by_engine, by_model = (
        rank.EngineScorer(engine),
        rank.load_scorer(str(tiny_base), {"a": tiny_adapters["a"]}),
    )
    allowed = [" json", " time", " os"]
    for delta in (None, "a"):
        for question in questions[:3]:
            ids = answer_ids(question, allowed, tok)
            scores = by_model.score(question.prompt_ids, ids, delta)
            assert by_engine.score(question.prompt_ids, ids, delta) == pytest.approx(scores, abs=1e-3)
    best = rank_answers(by_model, questions, allowed, tok)
    assert set(best) <= set(allowed) and len(best) == 9


def test_eval_command_on_a_real_base(
    tiny_base: Path,
    tiny_adapters: dict[str, Path],
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from ftray.delta import manifest
    from ftray.model.identity import base_identity

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in tiny_adapters["a"].iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    manifest.write(adapter, kind="low_rank", base=base_identity(tiny_base))
    Registry(tmp_path / "registry").publish(adapter, "tone", aliases=["prod"])
    config = tmp_path / "eval.yaml"
    config.write_text(
        f"base: {tiny_base}\nrows: {rows}/test.jsonl\ntrain_rows: {rows}/train.jsonl\n"
        f"deltas: [tone@prod]\nregistry: {tmp_path}/registry\noutput: {tmp_path}/report.json\n"
    )
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(config), "max_tokens=8"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    data = json.loads((tmp_path / "report.json").read_text())
    assert [result["model"] for result in data["results"]] == [BASE, CONSTANT, RANKING, "tone@1"]
    assert all(result["n"] == 9 for result in data["results"])
    assert data["allowed_answers"] == [" json", " os", " time"]
    assert len(data["differences"]) == 3
    assert "tone@1" in printed and "excludes zero" in printed


def test_deltas_are_folders_or_references(tmp_path: Path) -> None:
    folder = weights_delta(tmp_path / "delta")
    registry = tmp_path / "registry"
    Registry(registry).publish(folder, "tone")
    found = delta_folders([str(folder), "tone"], str(registry))
    assert list(found) == [str(folder), "tone@1"]
    with pytest.raises(DeltaError, match="not a delta folder"):
        delta_folders([str(tmp_path / "nowhere")], str(registry))
    with pytest.raises(RegistryError, match="did you mean tone"):
        delta_folders(["tonn"], str(registry))

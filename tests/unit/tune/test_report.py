import io
import json

import pytest
from rich.console import Console

from ftray.core.errors import TuneError
from ftray.core.fs import write_json
from ftray.tune.engine import Engine
from ftray.tune.members import members, schedule
from ftray.tune.plots import plot, plot_lineage, plot_parallel
from ftray.tune.population import Population, replay
from ftray.tune.result import cost, summarise
from ftray.tune.table import table
from tests.unit.tune.test_engine import Toy, config, search


@pytest.fixture
def finished(tmp_path):
    engine = search(tmp_path, Toy(diverges=[(3, 0)]), config())
    for member in engine.population.members:
        folder = tmp_path / "segments" / member.checkpoint
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "segment.json", {"checkpoint": "checkpoints/step-00000015", "delta": "delta"})
    return tmp_path, engine.journal.records


def text(renderable) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(renderable)
    return console.file.getvalue()


def test_the_summary_counts_what_the_journal_holds(finished):
    folder, records = finished
    result = summarise(config(), folder, records, 1.5)
    assert result.num_segments == 11 and result.num_failures == 1 and result.num_replaced == 1
    assert result.num_exploits == 2 == result.num_perturbations
    assert result.score == min(m.score for m in replay(records).members)
    assert result.delta == folder / "segments" / replay(records).members[result.member].checkpoint / "delta"
    assert result.lineage[-1] == result.member


def test_the_winner_is_what_was_trained_also_right_after_a_decision(tmp_path):
    """Both wear the donor's score then; the lower number is the copy, whose new values nobody has trained."""
    for seed in range(20):
        engine = search(tmp_path / str(seed), Toy(), config(seed=seed))
        records = engine.journal.records
        at = next(place for place, record in enumerate(records) if "decisions" in record)
        best = replay(records[: at + 1]).best("min")
        folder = tmp_path / str(seed) / "segments" / best.checkpoint
        folder.mkdir(parents=True)
        write_json(folder / "segment.json", {"checkpoint": None, "delta": None})
        result = summarise(config(), tmp_path / str(seed), records[: at + 1], 0.0)
        assert result.config == result.schedule[-1]["config"] and result.lineage == [result.member]
        if best.config != result.config:
            return
    pytest.fail("in no search has the winner been copied by a member of a lower number")


def test_a_schedule_follows_donors_back_to_the_beginning(finished):
    _, records = finished
    for member in replay(records).members:
        steps = schedule(records, member.checkpoint)
        assert [step["segment"] for step in steps] == [0, 1, 2]
        visited = [step["member"] for step in steps]
        # The lineage names each member once per take-over, the schedule once per segment.
        assert list(dict.fromkeys(visited)) == list(dict.fromkeys(member.lineage))


def test_the_table_shows_every_member_at_every_moment(finished):
    _, records = finished
    population = Population()
    for record in records:
        population.apply(record)
        shown = text(table(population, "min", 3))
        assert shown.count("\n") == 4 + 4
    assert "done" in shown and "failed" not in shown and "learning_rate" in shown
    starting = [record for record in records if record["kind"] in ("open", "start")][:2]
    assert "training" in text(table(replay(starting), "min", 3))


def test_the_plot_is_a_png_once_there_are_scores(finished, tmp_path):
    _, records = finished
    plot(records, tmp_path / "all.png", "eval_loss")
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    plot(records[:1], tmp_path / "none.png", "eval_loss")
    assert not (tmp_path / "none.png").exists()


def test_every_picture_is_a_png_and_drawn_from_the_journal_alone(finished, tmp_path):
    _, records = finished
    plot_lineage(records, tmp_path / "lineage.png", "min")
    plot_parallel(records, tmp_path / "parallel.png", "eval_loss", "min")
    for name in ("lineage.png", "parallel.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_curve_goes_on_along_the_lineage(finished):
    folder, records = finished
    starts = [record for record in records if record["kind"] == "start"]
    for start in starts:
        steps = range(start["stop_at"] - 4, start["stop_at"] + 1)
        lines = [json.dumps({"step": step, "loss": float(start["member"])}) + "\n" for step in steps]
        path = folder / "segments" / start["name"] / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines))
    population = replay(records)
    views = members(folder)
    assert [view.status for view in views] == ["done"] * 4
    for view, member in zip(views, population.members, strict=True):
        assert [record["step"] for record in view.curve] == list(range(1, 16))
        trained_by = [step["member"] for step in view.schedule for _ in range(5)]
        assert [record["loss"] for record in view.curve] == [float(index) for index in trained_by]
        assert [record["member"] for record in view.curve] == trained_by
        assert view.lineage == member.lineage and view.config == member.config
    assert any(len({r["member"] for r in view.curve}) > 1 for view in views)


def test_what_was_saved_is_what_was_not_trained(tmp_path):
    settings = config(policy={"type": "asha", "reduction_factor": 2}, num_members=8, num_segments=4)
    engine = search(tmp_path, Toy(), settings)
    best = engine.population.best("min")
    folder = tmp_path / "segments" / best.checkpoint
    folder.mkdir(parents=True)
    write_json(folder / "segment.json", {"checkpoint": None, "delta": None})
    found = summarise(settings, tmp_path, engine.journal.records, 0.0).cost
    assert (found.segments, found.segments_to_the_end, found.saved) == (16, 32, 0.5)
    # The toy's driver counts 50 tokens and a tenth of a second a segment.
    assert (found.tokens, found.tokens_to_the_end) == (800, 1600)
    assert found.cpu_s == pytest.approx(1.6) and found.cpu_s_to_the_end == pytest.approx(3.2)


def test_what_failed_was_not_saved_and_what_diverged_was_spent(tmp_path):
    settings = config(policy="random", num_segments=2)
    engine = Engine(tmp_path, settings, {})
    toy = Toy(diverges=[(0, 1)])
    while not engine.done:
        segment = engine.next_segment()
        if segment.member == 1:
            engine.failed(segment, "worker died", retry=False)
        else:
            engine.finished(segment, toy(segment), {}, 2.0, 1.0, 50, 1.0)
    engine.close()
    records, members = engine.journal.records, engine.population.members
    assert cost(records, members, settings).gpu_s == 6.0
    # As an older version wrote it, and then as this one does.
    old = [
        {k: v for k, v in r.items() if k != "gpu_s" and (r["kind"], k) != ("fail", "tokens")} for r in records
    ]
    assert cost(old, members, config(gpus_per_trial=2.0)).gpu_s == 24.0
    assert cost(old, members, settings).tokens == 5 * 50
    found = cost(records, members, settings)
    assert (found.segments, found.segments_to_the_end, found.saved) == (5, 8, 0.0)
    assert (found.tokens, found.cpu_s, found.seconds, found.tokens_to_the_end) == (6 * 50, 6.0, 12.0, 8 * 50)


def test_no_score_yet(tmp_path):
    engine = search(tmp_path, Toy(), config(), max_records=3)
    with pytest.raises(TuneError, match="no member has a score"):
        summarise(config(), tmp_path, engine.journal.records, 0.0)

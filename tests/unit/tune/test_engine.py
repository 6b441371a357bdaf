import itertools
import math
import random
from pathlib import Path

import pytest

from ftray.config.tune import TuneConfig
from ftray.core.errors import ConfigError, TuneError
from ftray.tune.engine import Engine, Segment
from ftray.tune.journal import encode
from ftray.tune.population import replay

# The toy's scores differ by orders of magnitude, so none of them counts as exploded.
PBT = {"type": "pbt", "explosion_factor": None}
SPACE = {"optim.learning_rate": {"loguniform": [1e-3, 1.0]}, "adapt.r": {"choice": [1, 2, 3]}}


def config(**changes) -> TuneConfig:
    settings = {
        "name": "search",
        "recipe": "recipe.yaml",
        "space": SPACE,
        "policy": PBT,
        "num_members": 4,
        "num_segments": 3,
    }
    return TuneConfig(**{**settings, "segment_steps": 5, **changes})


class Toy:
    """Gradient descent on w^2: a segment's result follows from its donor and configuration."""

    def __init__(self, diverges=()):
        self.weights: dict[str | None, float] = {None: 4.0}
        self.diverges = set(diverges)

    def __call__(self, segment: Segment) -> float:
        weight = self.weights[segment.checkpoint]
        for _ in range(5):
            weight -= segment.config["optim.learning_rate"] * 0.9 * weight / segment.config["adapt.r"]
        self.weights[segment.name] = weight
        return math.nan if (segment.member, segment.segment) in self.diverges else weight**2


def search(folder: Path, toy: Toy, settings: TuneConfig, slots=2, order=None, max_records=None) -> Engine:
    """Drive a search; results come back in random order. Stops, as if killed, after `max_records` records."""
    chance = random.Random(order)
    engine = Engine(folder, settings, {"name": "recipe"})
    running: list[Segment] = []
    while not engine.done:
        if max_records is not None and len(engine.journal.records) >= max_records:
            break
        if len(running) < slots and (segment := engine.next_segment()) is not None:
            running.append(segment)
            continue
        segment = running.pop(chance.randrange(len(running)))
        engine.finished(segment, toy(segment), {"loss": 1.0}, seconds=0.1, cpu_s=0.1, tokens=50)
    engine.close()
    return engine


def outcome(engine: Engine) -> list[tuple]:
    return [
        (m.config, m.segment, m.checkpoint, m.score, m.alive, m.lineage) for m in engine.population.members
    ]


def decisions(engine: Engine) -> list[dict]:
    return [decision for record in engine.journal.records for decision in record.get("decisions", [])]


def test_a_search_trains_every_segment_and_exploits_between_generations(tmp_path):
    engine = search(tmp_path, Toy(), config())
    records = engine.journal.records
    assert sum(r["kind"] == "commit" for r in records) == 4 * 3
    # One of four is replaced after each generation but the last.
    made = decisions(engine)
    assert len(made) == 2 and all(d["perturbed"] for d in made)
    assert not [r for r in records if r.get("decisions") and r["segment"] == 2]
    start = {(r["member"], r["segment"]): r for r in records if r["kind"] == "start"}
    for record in (r for r in records if r.get("decisions")):
        for decision in record["decisions"]:
            after = start[decision["member"], record["segment"] + 1]
            assert after["checkpoint"] == decision["checkpoint"]
            assert after["checkpoint"].startswith(f"m{decision['donor']:03}-s{record['segment']:03}-")
            assert after["config"] == decision["config"]
            donor = start[decision["donor"], record["segment"]]["config"]
            assert after["config"]["adapt.r"] == donor["adapt.r"]
            assert after["config"]["optim.learning_rate"] != donor["optim.learning_rate"]
            before = start[decision["member"], record["segment"]]["config"]
            assert decision["old_config"] == before and decision["config"] == after["config"] != before
            assert decision["old_score"] > decision["score"]
    best = engine.population.best("min")
    assert best is not None and best.score == min(m.score for m in engine.population.members)


def test_every_order_of_completion_and_any_number_of_slots_gives_one_final_state(tmp_path):
    outcomes = []
    for number, (slots, order) in enumerate(itertools.product([1, 2, 3, 4], range(6))):
        outcomes.append(outcome(search(tmp_path / str(number), Toy(), config(), slots=slots, order=order)))
    assert all(other == outcomes[0] for other in outcomes)
    assert outcome(search(tmp_path / "seed", Toy(), config(seed=1))) != outcomes[0]


def test_all_orders_of_one_generation_decide_the_same(tmp_path):
    seen = []
    for number, permutation in enumerate(itertools.permutations(range(4))):
        engine = Engine(tmp_path / str(number), config(), {})
        segments = [engine.next_segment() for _ in range(4)]
        assert engine.next_segment() is None
        toy = Toy()
        for index in permutation:
            engine.finished(segments[index], toy(segments[index]), {}, 0.0)
        seen.append(decisions(engine))
        engine.close()
    assert seen[0] and all(other == seen[0] for other in seen)


@pytest.mark.parametrize("diverges", [(), ((0, 0), (3, 1))])
def test_killed_at_every_record_and_resumed_gives_the_same_decisions(tmp_path, diverges):
    whole = search(tmp_path / "whole", Toy(diverges), config())
    total = len(whole.journal.records)
    for kill_after in range(1, total):
        folder = tmp_path / str(kill_after)
        toy = Toy(diverges)
        search(folder, toy, config(), order=kill_after, max_records=kill_after)
        resumed = search(folder, toy, config(), order=-kill_after)
        assert outcome(resumed) == outcome(whole)
        assert decisions(resumed) == decisions(whole)
        assert outcome(resumed) == [
            (m.config, m.segment, m.checkpoint, m.score, m.alive, m.lineage)
            for m in replay(resumed.journal.records).members
        ]


def test_a_driver_killed_every_few_records_still_ends_the_same(tmp_path):
    whole = search(tmp_path / "whole", Toy(), config())
    toy, drivers = Toy(), 0
    while True:
        engine = Engine(tmp_path / "killed", config(), {"name": "recipe"})
        drivers += 1
        if not engine.done:
            for _ in range(2):
                segment = engine.next_segment()
                if segment is not None:
                    engine.finished(segment, toy(segment), {}, 0.0)
        engine.close()
        if engine.done:
            break
    assert drivers > 5
    assert outcome(engine) == outcome(whole)


def test_cut_at_every_byte_of_the_journal_ends_the_same(tmp_path):
    whole = search(tmp_path / "whole", Toy(), config(num_segments=2, num_members=2))
    data = b"".join(encode(record) for record in whole.journal.records)
    for size in range(0, len(data), 7):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / "journal.jsonl").write_bytes(data[:size])
        toy = Toy()
        toy.weights |= {
            r["checkpoint"]: math.sqrt(r["score"]) for r in whole.journal.records if r["kind"] == "commit"
        }
        resumed = search(folder, toy, config(num_segments=2, num_members=2))
        assert outcome(resumed) == outcome(whole)


def test_results_of_an_older_driver_or_attempt_are_ignored(tmp_path):
    first = Engine(tmp_path, config(), {})
    stale = first.next_segment()
    first.close()
    second = Engine(tmp_path, config(), {})
    again = second.next_segment()
    assert again.name == stale.name and again.epoch == stale.epoch + 1
    before = len(second.journal.records)
    second.finished(stale, 1.0, {}, 0.0)
    second.failed(stale, "late", retry=True)
    assert len(second.journal.records) == before
    second.failed(again, "lost actor", retry=True)
    second.finished(again, 1.0, {}, 0.0)
    assert second.journal.records[-1]["kind"] == "fail"
    second.close()


def test_a_diverged_member_is_replaced_from_a_good_one(tmp_path):
    engine = search(tmp_path, Toy(diverges=[(1, 0), (2, 0)]), config())
    replaced = [d for d in decisions(engine) if d["replaced"]]
    assert [d["member"] for d in replaced] == [1, 2]
    assert all(d["donor"] in (0, 3) for d in replaced)
    assert all(member.alive and member.segment == 3 for member in engine.population.members)


def test_a_crashed_segment_is_tried_again_then_its_member_replaced(tmp_path):
    engine = Engine(tmp_path, config(max_failures=1), {})
    toy, crashes = Toy(), 0
    while not engine.done:
        segment = engine.next_segment()
        if segment.member == 2 and segment.segment == 1:
            crashes += 1
            engine.failed(segment, "worker died", retry=True)
        else:
            engine.finished(segment, toy(segment), {}, 0.0)
    fails = [r for r in engine.journal.records if r["kind"] == "fail"]
    assert crashes == 2 and [r["final"] for r in fails] == [False, True]
    assert [d["member"] for d in decisions(engine) if d["replaced"]] == [2]
    engine.close()


def test_failures_count_from_the_newest_checkpoint_and_from_the_newest_driver(tmp_path):
    engine = Engine(tmp_path, config(max_failures=1), {})
    for step in (0, 2, 4):
        segment = engine.next_segment()
        assert segment.member == 0 and engine.may_retry(segment, step)
        engine.failed(segment, "node lost", retry=True, step=step)
    engine.close()
    engine = Engine(tmp_path, config(max_failures=1), {})
    for final in (False, True):
        segment = engine.next_segment()
        assert segment.member == 0 and engine.may_retry(segment, 4) is not final
        engine.failed(segment, "node lost", retry=True, step=4)
    engine.close()
    fails = [record for record in engine.journal.records if record["kind"] == "fail"]
    assert [record["final"] for record in fails] == [False, False, False, False, True]
    assert not engine.population.members[0].alive
    # Journals of older versions say nothing of steps.
    old = [{key: value for key, value in r.items() if key != "step"} for r in engine.journal.records]
    assert [m.segment for m in replay(old).members] == [1, 0, 0, 0]


def test_a_user_mistake_is_not_tried_again(tmp_path):
    engine = Engine(tmp_path, config(max_failures=5), {})
    segment = engine.next_segment()
    engine.failed(segment, "adapt.r: too large", retry=False)
    assert not engine.population.members[segment.member].alive
    engine.close()


def test_when_all_members_fail_the_search_says_why(tmp_path):
    engine = Engine(tmp_path, config(), {})
    for segment in [engine.next_segment() for _ in range(4)]:
        engine.failed(segment, "no such file: rows.jsonl", retry=False)
    with pytest.raises(TuneError, match=r"every member has failed.*no such file: rows.jsonl"):
        engine.next_segment()
    engine.close()


def test_a_member_that_fails_in_the_last_segment_stays_out(tmp_path):
    engine = search(tmp_path, Toy(diverges=[(0, 2)]), config())
    assert not engine.population.members[0].alive
    assert engine.population.best("min").index != 0
    assert not [d for d in decisions(engine) if d["replaced"]]


def test_when_all_fail_in_the_last_segment_the_best_before_it_is_kept(tmp_path):
    settings = config(num_segments=2, policy="random")
    engine = Engine(tmp_path, settings, {})
    toy, made = Toy(diverges=[(member, 1) for member in range(4)]), []
    with pytest.raises(TuneError, match=r"every member has failed.*eval_loss is nan; `ftray tune report`"):
        while (segment := engine.next_segment()) is not None:
            made.append(segment.name)
            engine.finished(segment, toy(segment), {}, 0.0)
    engine.close()
    population = replay(engine.journal.records)
    scores = {r["score"]: r["checkpoint"] for r in engine.journal.records if r["kind"] == "commit"}
    best = population.best("min")
    assert (best.score, best.checkpoint) == min(scores.items()) and len(scores) == 4
    assert not set(engine.disposable(made)) & set(scores.values())
    assert population.best("max").score == max(scores)


def test_random_search_never_decides_and_goes_on_without_the_dead(tmp_path):
    engine = search(tmp_path, Toy(diverges=[(1, 0)]), config(policy="random"))
    assert decisions(engine) == []
    assert [m.segment for m in engine.population.members if m.alive] == [3, 3, 3]
    assert all(member.lineage == [member.index] for member in engine.population.members)


def test_mode_max_turns_the_ranking_round(tmp_path):
    low = search(tmp_path / "min", Toy(), config())
    high = search(tmp_path / "max", Toy(), config(mode="max"))
    first = decisions(low)[0]
    assert decisions(high)[0]["donor"] != first["donor"]
    assert high.population.best("max").score > low.population.best("min").score


def test_nothing_referenced_is_disposable(tmp_path):
    engine = Engine(tmp_path, config(), {})
    toy, chance, made = Toy(), random.Random(0), []
    running = []
    while not engine.done:
        while len(running) < 3 and (segment := engine.next_segment()) is not None:
            running.append(segment)
            made.append(segment.name)
        segment = running.pop(chance.randrange(len(running)))
        assert segment.checkpoint is None or segment.checkpoint in toy.weights, "its donor was deleted"
        engine.finished(segment, toy(segment), {}, 0.0)
        for name in engine.disposable([name for name in made if name in toy.weights]):
            del toy.weights[name]
            made.remove(name)
    kept = set(toy.weights) - {None}
    assert kept == {member.checkpoint for member in engine.population.members}
    engine.close()


def test_a_journal_of_another_search_is_refused(tmp_path):
    Engine(tmp_path, config(), {"r": 1}).close()
    with pytest.raises(TuneError, match="another `segment_steps`"):
        Engine(tmp_path, config(segment_steps=6), {"r": 1})
    with pytest.raises(TuneError, match="another `recipe`"):
        Engine(tmp_path, config(), {"r": 2})
    Engine(tmp_path, config(max_concurrent=7), {"r": 1}).close()


def test_pbt_says_when_it_cannot_work(tmp_path):
    with pytest.raises(ConfigError, match="num_members: 1"):
        Engine(tmp_path, config(num_members=1), {})
    with pytest.raises(ConfigError, match=r"adapt.r cannot change in training"):
        Engine(tmp_path, config(space={"adapt.r": {"choice": [1, 2]}}), {})
    assert not (tmp_path / "journal.jsonl").exists()
    Engine(tmp_path, config(space={"adapt.r": {"choice": [1, 2]}}, policy="random"), {}).close()


def test_records_are_told_to_the_listener_old_ones_first(tmp_path):
    search(tmp_path, Toy(), config(), max_records=6)
    told = []
    engine = Engine(tmp_path, config(), {"name": "recipe"}, told.append)
    assert told == engine.journal.records and told[-1]["kind"] == "epoch"
    engine.close()

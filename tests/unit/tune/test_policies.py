"""Each policy on the toy of `test_engine`: what it does, and that order, slots and kills change nothing."""

import itertools

import pytest

from ftray.core.errors import ConfigError, TuneError
from ftray.core.spec import parse
from ftray.tune.engine import Engine, search_of
from ftray.tune.pbt import PBT
from ftray.tune.policy import Boundary
from ftray.tune.population import Arrival, Member, replay
from tests.unit.tune.test_engine import Toy, config, decisions, outcome, search

POLICIES = {
    "pbt": {},
    "tournament": {"policy": {"type": "pbt", "selection": "tournament", "explosion_factor": None}},
    "asha": {"policy": {"type": "asha", "reduction_factor": 2}, "num_members": 8, "num_segments": 4},
    "tpe": {"policy": {"type": "tpe", "batch_size": 2, "num_startup": 3}, "num_members": 7},
    "grid": {
        "policy": "grid",
        "num_members": None,
        "space": {"optim.learning_rate": {"choice": [0.1, 0.2]}, "adapt.r": {"int": [1, 3]}},
    },
    "random": {"policy": "random"},
    "ray": {
        "policy": {"type": "ray", "searcher": "optuna", "settings": {"seed": 1}},
        "num_members": 5,
        "num_segments": 1,
    },
}


@pytest.mark.parametrize("name", POLICIES)
def test_order_slots_and_kills_change_nothing(tmp_path, name):
    settings = config(**POLICIES[name])
    whole = search(tmp_path / "whole", Toy(diverges=[(1, 0)]), settings)
    for number, (slots, order) in enumerate(itertools.product([1, 4], range(2))):
        other = search(tmp_path / str(number), Toy(diverges=[(1, 0)]), settings, slots=slots, order=order)
        assert outcome(other) == outcome(whole)
    total = len(whole.journal.records)
    for kill_after in range(1, total, max(1, total // 6)):
        toy, folder = Toy(diverges=[(1, 0)]), tmp_path / f"killed-{kill_after}"
        search(folder, toy, settings, order=kill_after, max_records=kill_after)
        resumed = search(folder, toy, settings, order=-kill_after)
        assert outcome(resumed) == outcome(whole) and decisions(resumed) == decisions(whole)


def test_halving_trains_fewer_at_each_rung(tmp_path):
    engine = search(tmp_path, Toy(), config(**POLICIES["asha"]))
    commits = [record for record in engine.journal.records if record["kind"] == "commit"]
    trained = [sum(record["segment"] == segment for record in commits) for segment in range(4)]
    assert trained == [8, 4, 2, 2]
    first = {record["member"]: record["score"] for record in commits if record["segment"] == 0}
    through = {record["member"] for record in commits if record["segment"] == 1}
    assert through == set(sorted(first, key=lambda member: first[member])[:4])
    # Nobody who was stopped counts as failed, and any of them may still be the best.
    assert all(member.alive for member in engine.population.members)
    assert sum(member.stopped for member in engine.population.members) == 6


def test_grid_is_every_allowed_combination(tmp_path):
    engine = search(tmp_path / "all", Toy(), config(**POLICIES["grid"]))
    found = {(m.config["adapt.r"], m.config["optim.learning_rate"]) for m in engine.population.members}
    assert found == set(itertools.product([1, 2, 3], [0.1, 0.2]))
    rule = [{"path": "adapt.r", "at_most": 2}]
    some = search(tmp_path / "some", Toy(), config(**POLICIES["grid"], constraints=rule))
    assert len(some.population.members) == 4
    ranged = {"policy": {"type": "grid", "points_per_range": 3}, "num_members": None}
    rates = {"space": {"optim.learning_rate": {"loguniform": [0.01, 1.0]}, "adapt.r": {"choice": [1]}}}
    three = search(tmp_path / "range", Toy(), config(**ranged, **rates))
    assert [m.config["optim.learning_rate"] for m in three.population.members] == [0.01, 0.1, 1.0]


def test_tpe_asks_for_better_members_than_chance(tmp_path):
    space = {"optim.learning_rate": {"loguniform": [1e-3, 2.0]}, "adapt.r": {"choice": [1, 2, 3]}}
    changes = {"num_members": 30, "num_segments": 1, "space": space}
    asked = search(
        tmp_path / "tpe", Toy(), config(policy={"type": "tpe", "num_startup": 8, "batch_size": 2}, **changes)
    )
    drawn = search(tmp_path / "random", Toy(), config(policy="random", **changes))

    def late(engine):
        return sorted(member.score for member in engine.population.members[8:])[11]

    assert late(asked) < late(drawn) / 2
    configs = [tuple(member.config.values()) for member in asked.population.members]
    assert len(set(configs)) > 25, "members of one batch differ"


def test_a_ray_searcher_must_repeat_itself(tmp_path):
    unseeded = config(**{**POLICIES["ray"], "policy": {"type": "ray", "searcher": "optuna"}})
    with pytest.raises(TuneError, match="give it a seed"):
        search(tmp_path, Toy(), unseeded)


def boundary(scores, *, mode="min", segment=1, arrived=None) -> Boundary:
    """Members that have all finished a segment; a score of None failed there."""
    members = []
    for index, score in enumerate(scores):
        lr = {"optim.learning_rate": 0.01 * (index + 1), "adapt.r": 1}
        arrival = None if score is None else Arrival(index, f"c{index}", score, lr, [index])
        alive = score is not None
        members.append(
            Member(index, lr, segment, f"c{index}", score, alive, lineage=[index], arrivals=[arrival])
        )
    search = search_of(config(mode=mode, num_members=len(scores)), {})
    chosen = members if arrived is None else [members[index] for index in arrived]
    return Boundary(search, members, chosen, idle=False)


def test_a_tournament_copies_only_from_those_who_did_better():
    policy = PBT(selection="tournament", explosion_factor=None)
    scores = [3.0, 1.0, 2.0, 5.0, 4.0, None]
    made = policy.decide(boundary(scores)).decisions
    assert {d.member for d in made} >= {5} and 1 not in {d.member for d in made}
    for decision in made:
        if decision.member != 5:
            assert scores[decision.donor] < scores[decision.member]
    assert [d.replaced for d in made if d.member == 5] == [True]


def test_exploded_members_are_replaced_beyond_the_quantile():
    scores = [2.0, 2.1, 90.0, 1.9, 70.0, 2.2, 2.3, 80.0]
    made = PBT().decide(boundary(scores)).decisions
    assert [d.member for d in made if d.replaced] == [2, 4, 7]
    assert all(d.donor in (0, 3) for d in made)
    # Not where large is good, and not if it is switched off.
    assert not [d for d in PBT().decide(boundary(scores, mode="max")).decisions if d.replaced]
    plain = PBT(explosion_factor=None).decide(boundary(scores)).decisions
    assert [d.member for d in plain] == [2, 7] and not any(d.replaced for d in plain)


def test_nothing_is_perturbed_at_the_last_boundary():
    assert PBT().decide(boundary([1.0, 2.0, 3.0, None], segment=3)).decisions == []


def test_where_nobody_waits_a_member_is_compared_at_its_own_step(tmp_path):
    settings = config(asynchronous=True, num_members=6, num_segments=4)
    states = set()
    for order in range(4):
        engine = search(tmp_path / str(order), Toy(diverges=[(2, 1)]), settings, slots=3, order=order)
        records = engine.journal.records
        starts = {(r["member"], r["segment"]): r for r in records if r["kind"] == "start"}
        for record in (r for r in records if r.get("decisions")):
            for decision in record["decisions"]:
                # The donor's checkpoint is of the step the member is at.
                made_at = int(decision["checkpoint"].split("-s")[1][:3])
                after = starts[decision["member"], made_at + 1]
                assert after["checkpoint"] == decision["checkpoint"] and made_at + 1 < 4
        assert all(member.alive and member.segment == 4 for member in engine.population.members)
        assert outcome(engine) == [
            (m.config, m.segment, m.checkpoint, m.score, m.alive, m.lineage) for m in replay(records).members
        ]
        states.add(str(outcome(engine)))
    assert len(states) > 1, "it promises no more than that what was recorded is kept"


def test_where_nobody_waits_no_checkpoint_is_deleted_that_somebody_copies(tmp_path):
    engine = Engine(tmp_path, config(asynchronous=True, num_members=6, num_segments=5), {})
    toy, running, made = Toy(), [], []
    while not engine.done:
        while len(running) < 4 and (segment := engine.next_segment()) is not None:
            running.append(segment)
        segment = running.pop(0 if len(made) % 3 else -1)
        assert segment.checkpoint is None or segment.checkpoint in toy.weights, "its donor was deleted"
        engine.finished(segment, toy(segment), {}, 0.0)
        made.append(segment.name)
        for name in engine.disposable([name for name in made if name in toy.weights]):
            del toy.weights[name]
    assert len(toy.weights) < len(made)
    engine.close()


@pytest.mark.parametrize("name", ["pbt", "asha", "random"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_budget_of_a_population_is_kept_to(tmp_path, name, asynchronous):
    settings = config(**POLICIES[name], max_segments=7, asynchronous=asynchronous)
    engine = search(tmp_path, Toy(), settings)
    commits = [record for record in engine.journal.records if record["kind"] == "commit"]
    assert len(commits) == 7 and engine.done


def test_nothing_is_decided_once_the_budget_is_spent(tmp_path):
    engine = search(tmp_path, Toy(), config(max_segments=8))
    after = [record["kind"] for record in engine.journal.records if "decisions" in record]
    assert len(after) == 1, "two generations of four: one boundary has something behind it"
    trained = {
        record["checkpoint"]: record["config"] for record in engine.journal.records if "score" in record
    }
    assert all(member.config == trained[member.checkpoint] for member in engine.population.members)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy": {"type": "asha", "grace_segments": 3}}, "policy.grace_segments: 3 leaves no rung"),
        ({"policy": "asha", "num_members": 1}, "asha takes 2 or more"),
        ({"policy": "grid", "num_members": None}, "space.optim.learning_rate: a range without steps"),
        (
            {**POLICIES["grid"], "num_members": 5},
            "num_members: 5, but the grid has 6 points",
        ),
        (
            {**POLICIES["grid"], "constraints": [{"path": "adapt.r", "less_than": 1}]},
            "no point of the grid keeps",
        ),
        ({"constraints": [{"path": "adapt.r", "less_than": 1}]}, "adapt.r < 1: nothing of the space keeps"),
        (
            {"constraints": [{"path": "adapt.rank", "at_most": 1}]},
            "adapt.rank: no such field; did you mean `adapt.r`",
        ),
        ({**POLICIES["ray"], "asynchronous": True}, "asked in batches"),
    ],
)
def test_a_search_that_cannot_work_is_refused_before_anything_is_written(tmp_path, changes, words):
    with pytest.raises(ConfigError) as caught:
        Engine(tmp_path, config(**changes), {})
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "journal.jsonl").exists()


def test_an_unknown_searcher_is_refused_with_near_misses():
    from ftray.config.tune import TuneConfig

    with pytest.raises(ConfigError, match="did you mean `optuna`"):
        parse(
            TuneConfig,
            {
                "name": "s",
                "recipe": "r",
                "space": {"a.b": {"int": [1, 2]}},
                "policy": {"type": "ray", "searcher": "optunna"},
            },
        )

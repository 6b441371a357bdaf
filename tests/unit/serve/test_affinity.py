"""Requests under one delta prefer one replica, all fronts the same, unless it is much busier."""

from collections import Counter

from ftray.serve.affinity import SLACK, preferred

DELTAS = [f"xxh3:{number:032x}" for number in range(300)]


def home(delta: str, names: list[str]) -> str:
    return preferred(delta, dict.fromkeys(names, 0))[0][0]


def test_deltas_are_spread_and_stay_where_they_are() -> None:
    names = ["r1", "r2", "r3"]
    before = {delta: home(delta, names) for delta in DELTAS}
    assert all(70 < count < 130 for count in Counter(before.values()).values())
    assert all(home(delta, names[::-1]) == before[delta] for delta in DELTAS)
    after = {delta: home(delta, names[:2]) for delta in DELTAS}  # one has died
    assert all(after[delta] == before[delta] for delta in DELTAS if before[delta] != "r3")
    assert set(after.values()) == {"r1", "r2"}


def test_a_busy_home_is_left_for_the_others() -> None:
    at = home(DELTAS[0], ["r1", "r2"])
    other = "r2" if at == "r1" else "r1"
    assert preferred(DELTAS[0], {at: SLACK, other: 0}) == [[at], [other]]
    assert preferred(DELTAS[0], {at: SLACK + 1, other: 0}) == [[at, other]]
    assert preferred(DELTAS[0], {at: 100, other: None}) == [[at], [other]]


def test_what_was_tried_in_vain_is_tried_elsewhere() -> None:
    queues = {"r1": 0, "r2": 0, "r3": 0}
    first = [preferred(DELTAS[0], queues, attempt)[0][0] for attempt in range(4)]
    assert set(first[:3]) == set(queues) and first[3] == first[0]


def test_the_base_is_everywhere() -> None:
    assert preferred(None, {"r1": 5, "r2": None}) == [["r1", "r2"]]
    assert preferred("x", {}) == []
    assert preferred("x", {"r1": 3}) == [["r1"]]

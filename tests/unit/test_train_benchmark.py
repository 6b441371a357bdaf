"""How the training benchmark joins its runs and lets processes take turns."""

import threading
from pathlib import Path

import torch

from benchmarks.train.record import commands, merge
from benchmarks.train.sections import worst
from benchmarks.train.step_clock import TimedAdamW, begin, take_turns


def test_sections_of_several_runs_meet() -> None:
    first = {"versus_trl": {"seq512_1t": {"ratio_vs_trl_packing_best": 3.0}}, "startup_s": 9.0}
    second = {"versus_trl": {"seq2048_1t": {"ratio_vs_trl_packing_best": 2.5}}, "startup_s": 8.0}
    both = merge(first, second)
    assert both["startup_s"] == 8.0 and set(both["versus_trl"]) == {"seq512_1t", "seq2048_1t"}
    assert worst(both) == {"ratio_vs_trl_packing_best": 2.5}
    words = ["--only", "trl", "--folder", "here", "--record", "there", "--json"]
    command = "python -m benchmarks.train --only trl --json"
    assert commands("trl", first, words) == {"trl seq512_1t": command}
    assert commands("ray", {"startup_s": 1.0}, words) == {"ray": command}


def test_runs_take_turns(tmp_path: Path) -> None:
    order: list[str] = []

    def train(name: str) -> None:
        weight = torch.nn.Parameter(torch.ones(2))
        (optimizer,) = TimedAdamW(path=str(tmp_path / name)).build({"weight": weight})
        for _ in range(4):
            order.append(name)
            weight.grad = torch.ones(2)
            optimizer.step()

    threads = [threading.Thread(target=train, args=(name,), daemon=True) for name in "ab"]
    for name, thread in zip("ab", threads, strict=True):
        thread.start()
        begin(tmp_path / name)
    steps = take_turns([tmp_path / "a", tmp_path / "b"], 3)
    for thread in threads:
        thread.join(timeout=10)
    assert "".join(order) == "abababab"
    assert [len(found) for found in steps] == [3, 3]
    assert all(step["wall_s"] >= 0 and step["cpu_s"] >= 0 for found in steps for step in found)

"""Thousands of deltas over a few places: read beside the steps, never moved in use, let go of when nobody asks."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ftray.core.errors import DeltaError, RegistryError, RequestError
from ftray.engine.api import Output, Request, Sampling
from ftray.engine.core import StepEngine
from ftray.engine.fake import FakeDelta, FakeEngineConfig, FakeRunner
from ftray.engine.places import OwnWeightsError
from ftray.engine.scheduler import Row
from ftray.engine.torch_engine import TorchEngineConfig
from ftray.testing import tiny
from tests.peft_reference import Reference


class Watched(FakeRunner):
    """Spells names, and notes what is done to it: reads wait for `gate`, and a delta in use must be in place."""

    def __init__(self) -> None:
        super().__init__("{model}", 0.0)
        self.gate = threading.Event()
        self.gate.set()
        self.reads: list[str] = []
        self.in_place: set[str] = set()
        self.most = 0

    def read(self, folder: str) -> FakeDelta:
        assert threading.current_thread() is not threading.main_thread() or "now" in folder
        self.gate.wait(10)
        self.reads.append(folder)
        if "bad" in folder:
            raise DeltaError(f"{folder}: damaged; publish it anew")
        if "gone" in folder:
            raise OSError("no route to host")
        if folder.endswith(".own"):
            raise OwnWeightsError(folder)
        return super().read(folder)

    def read_own(self, folder: str) -> FakeDelta:
        return replace(super().read(folder), mixed_batch=False)

    def load(self, key: str, delta: FakeDelta) -> None:
        super().load(key, delta)
        assert key not in self.in_place, "a key was used twice"
        self.in_place.add(key)
        self.most = max(self.most, len(self.in_place))

    def unload(self, key: str) -> None:
        super().unload(key)
        self.in_place.discard(key)

    def forward(self, rows: list[Row], keys: list[str | None], keep: list[int]) -> torch.Tensor:
        assert {key for key in keys if key} <= self.in_place, "computed under a delta that is not in place"
        return super().forward(rows, keys, keep)


def make(max_loras: int = 2, max_cpu_loras: int = 2, max_num_seqs: int = 8) -> tuple[StepEngine, Watched]:
    plain = FakeEngineConfig(max_num_seqs=max_num_seqs).build("fake")
    runner = Watched()
    info = plain.info.__class__(**{**vars(plain.info), "max_slots": max_loras})
    engine = StepEngine(runner, plain.tokenizer, plain.scheduler, info, [256], max_host=max_cpu_loras)
    return engine, runner


def ask(name: str, delta: str | None, max_tokens: int = 64) -> Request:
    return Request(id=name, prompt_ids=[1, 2], delta=delta, sampling=Sampling(max_tokens=max_tokens))


def run(engine: StepEngine, until: Callable[[], bool] = lambda: False) -> dict[str, list[Output]]:
    outputs: dict[str, list[Output]] = {}
    deadline = time.monotonic() + 20
    while engine.has_work() and not until():
        assert time.monotonic() < deadline, "it never ended"
        for output in engine.step():
            outputs.setdefault(output.id, []).append(output)
    return outputs


def text(parts: list[Output]) -> str:
    return "".join(part.text for part in parts)


def test_two_thousand_deltas_over_a_few_places() -> None:
    engine, runner = make(max_loras=4, max_cpu_loras=10)
    for number in range(2000):
        engine.register_delta(f"d{number}", f"/deltas/n{number}")
    asked = [(37 * number) % 2000 for number in range(120)]
    for number, delta in enumerate(asked):
        engine.add(ask(str(number), f"d{delta}"))
    outputs = run(engine)
    assert {name: text(parts) for name, parts in outputs.items()} == {
        str(number): f"n{delta}" for number, delta in enumerate(asked)
    }
    assert all(part.digest == f"n{asked[int(name)]}" for name, parts in outputs.items() for part in parts)
    assert runner.most <= 4
    assert len(runner.reads) == 120
    assert sum(engine.delta_info(f"d{number}").tier == "host" for number in range(2000)) <= 10


def test_a_slow_read_holds_nobody_up() -> None:
    engine, runner = make()
    engine.register_delta("quick", "/quick")
    engine.add(ask("0", "quick"))
    run(engine)
    runner.gate.clear()
    engine.register_delta("slow", "/slow")
    engine.add(ask("waits", "slow"))
    for number in range(5):
        engine.add(ask(f"q{number}", "quick"))
        engine.add(ask(f"b{number}", None))
    steps = 0
    started = time.monotonic()
    done: set[str] = set()
    while len(done) < 10:
        done |= {output.id for output in engine.step() if output.finish_reason}
        steps += 1
    assert time.monotonic() - started < 1
    assert (engine.stats().loading, engine.stats().waiting) == (1, 1)
    runner.gate.set()
    assert text(run(engine)["waits"]) == "slow"


def test_one_in_use_is_never_moved_and_one_that_waits_gets_its_turn() -> None:
    """Two places are in use for ever by a stream of requests; a third delta is answered all the same."""
    engine, runner = make(max_loras=2, max_num_seqs=4)
    for name in ("x", "y", "z"):
        engine.register_delta(name, f"/{name}")
    asked = 0

    def busy() -> None:
        nonlocal asked
        live = [seq.request.delta for seq in engine.scheduler.sequences()]
        for name in ("x", "y"):
            for _ in range(2 - live.count(name)):
                asked += 1
                engine.add(ask(f"{name}{asked}", name, 2))

    for _ in range(50):
        busy()
        engine.step()
    engine.add(ask("third", "z", 2))
    for _ in range(200):
        busy()
        if any(output.id == "third" and output.finish_reason for output in engine.step()):
            break
    else:
        pytest.fail("the third delta was never answered")
    assert runner.most <= 2


def test_a_bad_delta_harms_its_own_requests_alone(caplog: pytest.LogCaptureFixture) -> None:
    engine, runner = make()
    for name in ("good", "bad", "gone"):
        engine.register_delta(name, f"/{name}")
    for number in range(6):
        engine.add(ask(f"g{number}", "good"))
    for name in ("bad", "gone"):
        engine.add(ask(name, name))
    outputs = run(engine)
    assert all(text(outputs[f"g{number}"]) == "good" for number in range(6))
    (bad,), (gone,) = outputs["bad"], outputs["gone"]
    assert (bad.finish_reason, bad.status, bad.error) == (
        "error",
        400,
        "bad: cannot be used; publish it anew",
    )
    assert (gone.status, gone.error) == (503, "gone: not to be had now; try again shortly")
    assert engine.delta_info("bad").error == "/bad: damaged; publish it anew"
    assert "/bad: damaged" in caplog.text and "no route to host" in caplog.text
    assert engine.delta_info("bad").tier == "failed"
    engine.add(ask("again", "bad"))
    assert run(engine)["again"][0].status == 400
    assert runner.reads.count("/bad") == 2
    assert engine.stats().waiting == 0


def test_a_source_may_be_a_function_that_brings_the_folder() -> None:
    engine, _ = make()

    def missing() -> str:
        raise RegistryError("name: no such version; publish it")

    engine.register_delta("far", lambda: "/cache/far")
    engine.register_delta("missing", missing)
    engine.add(ask("0", "far"))
    engine.add(ask("1", "missing"))
    outputs = run(engine)
    assert text(outputs["0"]) == "far"
    assert outputs["1"][0].status == 400


def test_clients_that_leave_while_their_delta_is_read() -> None:
    engine, runner = make()
    runner.gate.clear()
    engine.register_delta("x", "/x")
    engine.add(ask("0", "x"))
    engine.step()
    with pytest.raises(DeltaError, match="in flight"):
        engine.unload_delta("x")
    engine.cancel("0")
    assert not engine.has_work()
    engine.unload_delta("x")
    runner.gate.set()
    engine.register_delta("x", "/other")
    engine.add(ask("1", "x"))
    assert text(run(engine)["1"]) == "other"
    assert engine.stats().loading == 0


def test_a_name_switches_at_once_and_those_in_flight_end_on_the_old() -> None:
    engine, runner = make()
    engine.load_delta("live", "/now/first")
    engine.add(ask("old", "live"))
    engine.step()
    engine.load_delta("live", "/now/second", replace=True)
    engine.add(ask("new", "live"))
    outputs = run(engine)
    assert {part.digest for part in outputs["old"]} == {"first"}
    assert {part.digest for part in outputs["new"]} == {"second"}
    assert len(runner.in_place) == 1
    with pytest.raises(DeltaError, match="damaged"):
        engine.load_delta("live", "/now/bad", replace=True)
    engine.add(ask("still", "live"))
    assert text(run(engine)["still"]) == "second"


def test_deltas_that_share_no_batch_take_turns_in_steps_of_their_own() -> None:
    engine, runner = make(max_loras=2)
    names = {"one": True, "two": True, "whole": False, "other": False}
    for name, mixed in names.items():
        engine.register_delta(name, f"/{name}{'' if mixed else '.own'}")
    steps: list[set[str | None]] = []
    forward = runner.forward

    def noting(rows: list[Row], keys: list[str | None], keep: list[int]) -> torch.Tensor:
        steps.append({key and runner._names[key] for key in keys})
        return forward(rows, keys, keep)

    runner.forward = noting  # type: ignore[method-assign]
    for number in range(3):
        for delta in (None, *names):
            engine.add(ask(f"{number}{delta}", delta))
    outputs = run(engine)
    assert {name: text(parts) for name, parts in outputs.items()} == {
        f"{number}{delta}": {None: "base", "whole": "whole.own", "other": "other.own"}.get(delta, delta)
        for number in range(3)
        for delta in (None, *names)
    }
    alone = [step for step in steps if step & {"whole.own", "other.own"}]
    assert alone and all(len(step) == 1 for step in alone)
    assert any(len(step) > 1 for step in steps)
    assert runner.most <= 3  # two that share, one of its own


def test_whole_models_are_not_read_before_there_is_room() -> None:
    engine, runner = make(max_loras=8)
    runner.gate.clear()
    for number in range(6):
        engine.register_delta(f"{number}", f"/{number}.own")
        engine.add(ask(f"{number}", f"{number}", max_tokens=4))
    engine.register_delta("small", "/small")
    engine.add(ask("small", "small"))
    runner.gate.set()
    most = 0

    def look() -> bool:
        nonlocal most
        infos = [engine.delta_info(f"{number}") for number in range(6)]
        most = max(most, sum(info.tier in ("slot", "host") for info in infos))
        return False

    outputs = run(engine, look)
    assert all(parts[-1].finish_reason in ("stop", "length") for parts in outputs.values())
    assert len(outputs) == 7 and most <= 2  # one in place, one that waits for it


def test_unknown_and_known_names() -> None:
    engine, _ = make()
    engine.register_delta("x", "/x")
    with pytest.raises(DeltaError, match="already loaded"):
        engine.register_delta("x", "/y")
    with pytest.raises(DeltaError, match="not loaded"):
        engine.delta_info("y")
    with pytest.raises(RequestError, match="not loaded") as caught:
        engine.add(ask("0", "y"))
    assert caught.value.status == 404
    assert (engine.deltas(), engine.delta_info("x").tier) == (["x"], "disk")


def test_a_delta_whose_files_changed_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    engine = TorchEngineConfig(max_loras=1, max_cpu_loras=0, kv_cache_tokens=256).build(str(tiny_base))
    for name, seed in (("x", 1), ("y", 2)):
        engine.register_delta(name, str(tiny.random_adapter(tiny_base, tmp_path / name, seed=seed)))
    for delta in ("x", "y"):
        assert engine.generate([ask("0", delta, 3)])[0].error is None
    engine.generate([ask("0", None, 3)])
    tiny.random_adapter(tiny_base, tmp_path / "x", seed=3)
    (output,) = engine.generate([ask("0", "x", 3)])
    assert output.status == 400 and "new version" in (engine.delta_info("x").error or "")


def test_many_ranks_and_targets_over_two_places_equal_peft(tiny_base: Path, tmp_path: Path) -> None:
    targets: list[str | list[str]] = [
        "all-linear",
        ["q_proj"],
        ["k_proj", "down_proj"],
        ["o_proj", "up_proj"],
    ]
    folders = {
        f"d{number}": tiny.random_adapter(
            tiny_base,
            tmp_path / f"d{number}",
            r=1 + 3 * number,
            seed=number,
            target_modules=targets[number % 4],
        )
        for number in range(7)
    }
    engine = TorchEngineConfig(max_loras=2, max_cpu_loras=1, kv_cache_tokens=2048).build(str(tiny_base))
    for name, folder in folders.items():
        engine.register_delta(name, str(folder))
    reference = Reference(tiny_base, folders)
    requests = [
        Request(
            id=str(number),
            prompt_ids=list(range(9 + number, 20 + number)),
            delta=f"d{number % 7}",
            sampling=Sampling(max_tokens=6, ignore_eos=True),
        )
        for number in range(21)
    ]
    for request, output in zip(requests, engine.generate(requests), strict=True):
        reference.check(request, output)
    assert engine.stats().slots_used == 2

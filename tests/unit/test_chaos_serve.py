"""A campaign against an endpoint finds what it looks for."""

import json
from typing import Any

import pytest

from benchmarks.chaos_serve.clients import Asked, judge_stream
from benchmarks.chaos_serve.judge import Judge
from benchmarks.chaos_serve.slices import Slice, summary
from benchmarks.chaos_serve.versions import SHORT, Said
from benchmarks.chaos_serve.watch import Watch

ASKED = Asked("ann", "a@prod", 0, stream=True)


def judge() -> Judge:
    texts = {(0, SHORT): "good"}
    return Judge({"1": Said("a", texts=texts), "2": Said("a", bad=True), "3": Said("b", texts=texts)})


@pytest.mark.parametrize(
    ("digest", "text", "found"),
    [
        ("1", "good", None),
        ("1", "goof", "wrong_answers"),
        ("2", "good", "bad_versions_served"),
        ("3", "good", "wrong_models"),
        ("4", "good", "wrong_models"),
    ],
)
def test_answers_are_judged_by_the_version_that_is_named(digest: str, text: str, found: str | None) -> None:
    judged = judge()
    judged.answer("a@prod", 0, SHORT, digest, text)
    assert judged.wrong() == (found is not None)
    assert found is None or getattr(judged.counts, found) == 1


def event(text: str, reason: str | None = None) -> str:
    chunk = {"choices": [{"delta": {"content": text}, "finish_reason": reason}]}
    return "data: " + json.dumps(chunk, separators=(",", ":"), ensure_ascii=False) + "\n\n"


DONE, ERROR = "data: [DONE]\n\n", 'event: error\ndata: {"error":{}}\n\n'


@pytest.mark.parametrize(
    ("stream", "found"),
    [
        (event("go") + event("od", "length") + DONE, "answered"),
        (event("go") + event("o", "length") + DONE, "wrong_answers"),
        (event("go") + DONE, "false_ends"),
        (event("go"), "failed"),
        ("", "failed"),
        (event("go") + ERROR, "streams_ended_with_error"),
        (event("go") + ERROR + DONE, "false_ends"),
    ],
)
def test_streams_are_judged_by_their_end(stream: str, found: str) -> None:
    judged = judge()
    judge_stream(judged, ASKED, "1", stream)
    assert getattr(judged.counts, found) == 1


def watched(**measures: list[float]) -> Watch:
    """An endpoint whose engine held this, and whose other processes stood still."""
    watch = Watch(lambda: 0)
    for kind in ("http", "control"):
        watch.samples[f"{kind}-2", "mib"] = [(at / 30, 100.0) for at in range(20)]
    for name, values in measures.items():
        watch.samples["engine-1", name] = [(at / 30, value) for at, value in enumerate(values)]
    return watch


def test_what_grows_after_the_start_is_a_leak() -> None:
    warming = [100.0, 200.0, 300.0]
    assert len(Watch(lambda: 0).leaks()) == 3
    assert watched(fds=[10.0] * 20).leaks() == ["engine: too little was seen"]
    flat = watched(mib=[*warming, *[400.0, 401.0, 400.5] * 5], fds=[10, 20, 30, *[40] * 15])
    assert flat.leaks() == []
    leaking = watched(mib=[400 + 0.1 * at for at in range(60)], fds=[40.0 + at for at in range(60)])
    assert [leak.partition(":")[0] for leak in leaking.leaks()] == ["engine_mib_per_minute", "engine_fds"]


def test_slices_add_up() -> None:
    def slice_of(requests: int, recovery_s: float, **fields: Any) -> Slice:
        counts = {"requests": requests, "slowest_recovery_s": recovery_s}
        return Slice("kills", counts=counts, events={"kill_engine": 2, "publish": 1}, **fields)

    found = summary([slice_of(3, 7.0), slice_of(4, 5.0, broken=["recovered late"])], 1.0, 0)
    assert (found["requests"], found["slowest_recovery_s"], found["kills"]) == (7, 7.0, 4)
    assert (found["promises_broken"], found["slices"]) == (1, {"kills": 2})

"""Batch inference through Ray Data gives what the engine gives, in order."""

import json
from pathlib import Path

import pytest

from ftray.core.errors import DataError, DeltaError
from ftray.engine import ray_generate
from ftray.engine.api import Request, Sampling
from ftray.engine.ray_generate import Job, generate
from ftray.engine.torch_engine import TorchEngineConfig

pytestmark = pytest.mark.ray

SAMPLING = Sampling(max_tokens=6)


def job(base: Path, delta: Path | None) -> Job:
    return Job(
        base=str(base), engine=TorchEngineConfig(), delta=str(delta) if delta else None, sampling=SAMPLING
    )


def test_answers_stand_in_the_order_of_the_rows(
    ray_cluster: None,
    tiny_base: Path,
    tiny_adapters: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_generate, "_UNIT_BYTES", 128)
    prompts = [f"question {number} 🙂" for number in range(40)]
    rows = [json.dumps({"prompt": prompt, "note": "\ud800"}) for prompt in prompts]
    source, output = tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl"
    source.write_text("\n".join([*rows[:20], "{broken", *rows[20:]]))
    seen: list[int] = []
    done = generate(
        job(tiny_base, tiny_adapters["a"]), source, output, progress=lambda n, total: seen.append(n)
    )
    engine = TorchEngineConfig().build(str(tiny_base))
    engine.load_delta("a", str(tiny_adapters["a"]))
    expected = engine.generate(
        Request(id=prompt, prompt_ids=engine.tokenizer.encode(prompt), delta="a", sampling=SAMPLING)
        for prompt in prompts
    )
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["input"]["prompt"] for row in answers] == prompts
    assert [row["output"] for row in answers] == [row.text for row in expected]
    assert [row["line"] for row in answers] == [n for n in range(41) if n != 20]
    assert (done.num_rows, done.num_quarantined) == (40, 1)
    assert done.quarantine is not None
    bad = json.loads(done.quarantine.read_text())
    assert (bad["line"], bad["offset"], bad["reason"]) == (
        20,
        source.read_text().index("{broken"),
        "not JSON",
    )
    assert seen == sorted(seen)
    assert seen[-1] == source.stat().st_size
    assert sorted(path.name for path in output.parent.iterdir()) == [
        "out.jsonl",
        "out.jsonl.quarantine.jsonl",
    ]


def test_mistakes_are_one_line_and_leave_no_output(
    ray_cluster: None, tiny_base: Path, tmp_path: Path
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    with pytest.raises(DataError, match=r"in\.jsonl"):
        generate(job(tiny_base, None), source, output)
    source.write_text('{"prompt": "x"}\n')
    with pytest.raises(DeltaError, match=r"adapter_config\.json is missing"):
        generate(job(tiny_base, tmp_path), source, output)
    assert not output.exists()

"""vLLM behind our protocol gives what PEFT gives; runs where `FTRAY_VLLM_PYTHON` names a Python that has vLLM."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ftray.core.errors import ConfigError
from ftray.engine.vllm_engine import VLLMEngine, VLLMEngineConfig
from ftray.engine.vllm_words import VLLMDelta
from ftray.testing import tiny
from tests.peft_reference import Reference

ROOT = Path(__file__).parents[3]


def test_without_vllm_it_says_so(tiny_base: Path) -> None:
    with pytest.raises(ConfigError, match="no vLLM"):
        VLLMEngineConfig().build(str(tiny_base))


class Named:
    """As much of vLLM's engine as names are let go of by, for where there is no vLLM."""

    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(device_config=SimpleNamespace(device_type="cpu"))
        self.removed: list[int] = []

    def remove_lora(self, number: int) -> None:
        self.removed.append(number)


class Unread(VLLMEngine):
    """Gives deltas numbers and reads nothing."""

    def _read(self, delta: VLLMDelta) -> None:
        delta.lora = SimpleNamespace(lora_int_id=next(self._ids))


def test_what_was_replaced_is_let_go_after_its_last_request() -> None:
    vllm: Any = Named()
    engine = Unread(vllm, None, None, None)  # type: ignore[arg-type]
    engine.load_delta("a", "/1")
    engine.load_delta("a", "/2", replace=True)
    assert vllm.removed == [1]
    second = engine._find("a")
    engine._live["request"] = None, second, set()  # type: ignore[assignment]
    second.in_flight = 1
    engine.load_delta("a", "/3", replace=True)
    assert vllm.removed == [1]
    engine._forget("request")
    assert vllm.removed == [1, 2]
    engine.unload_delta("a")
    assert vllm.removed == [1, 2, 3] and engine.deltas() == []


@pytest.mark.slow
@pytest.mark.skipif(
    "FTRAY_VLLM_PYTHON" not in os.environ, reason="FTRAY_VLLM_PYTHON names no Python that has vLLM"
)
def test_the_contract_holds_for_vllm(tmp_path: Path) -> None:
    # vLLM's attention on CPUs takes heads of 32 and more.
    base = tiny.tiny_base(tmp_path / "base", hidden_size=128)
    folders = {
        name: tiny.random_adapter(base, tmp_path / name, r=8, seed=seed, scale=0.1)
        for seed, name in enumerate(("a", "b"), 1)
    }
    (tmp_path / "empty").mkdir()
    requests: list[dict[str, Any]] = [
        {
            "id": f"{number}{delta}",
            "prompt_ids": list(range(9, 20 + 9 * number)),
            "delta": delta,
            "tenant": f"t{number}",
            "sampling": {"max_tokens": 8, "ignore_eos": True, "logprobs": 2},
        }
        for number in range(3)
        for delta in (None, "a", "b")
    ]
    item = {"prompt_ids": list(range(9, 30)), "completion_ids": [9, 200, 31], "delta": "a"}
    job = {
        "base": str(base),
        "deltas": {name: str(folder) for name, folder in folders.items()},
        "requests": requests,
        "cancel": requests[4]["id"],
        "scores": [item],
        "bad": [str(tmp_path / "empty")],
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [os.environ["FTRAY_VLLM_PYTHON"], "-m", "tests.vllm_contract", str(tmp_path / "job.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.strip().splitlines()[-1])
    reference = Reference(base, folders)
    assert found["engine"] == "vllm"
    for request, output in zip(requests, found["whole"], strict=True):
        reference.check_tokens(request["prompt_ids"], output["token_ids"], request["delta"])
        assert output["digest"] == found["digests"].get(request["delta"], output["digest"])
        assert [token["token_id"] for token in output["logprobs"]] == output["token_ids"]
        if request["id"] != job["cancel"]:
            reference.check_tokens(request["prompt_ids"], found["streamed"][request["id"]], request["delta"])
            assert found["texts"][request["id"]] == output["text"]
    assert job["cancel"] not in found["streamed"]
    assert "adapter_config.json" in found["refused"][0]
    assert "prompt_logprobs" in found["refused"][1]
    assert found["in_flight"] == [0, 0]

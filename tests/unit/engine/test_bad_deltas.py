"""Deltas that must not answer: their own requests end as a mistake of theirs, and nobody else notices."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftray.delta import manifest
from ftray.engine.api import Output, Request, Sampling
from ftray.engine.core import StepEngine
from ftray.engine.torch_engine import TorchEngineConfig
from ftray.model.identity import base_identity

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def engine(tiny_base: Path) -> StepEngine:
    """One that takes ranks up to 8 and no weights of a delta's own."""
    return TorchEngineConfig(kv_cache_tokens=512, max_lora_rank=8, max_own_weights=0).build(str(tiny_base))


def changed(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: change(name, tensor) for name, tensor in tensors.items()}, folder / WEIGHTS)


def missing(folder: Path) -> None:
    shutil.rmtree(folder)


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-16])


def not_finite(folder: Path) -> None:
    changed(folder, lambda name, tensor: tensor * float("nan"))


def narrow(folder: Path) -> None:
    changed(folder, lambda name, tensor: tensor[:, :-1].contiguous() if "lora_A" in name else tensor)


def of_high_rank(folder: Path) -> None:
    changed(folder, lambda name, tensor: torch.cat([tensor] * 4, dim=0 if "lora_A" in name else 1))
    settings = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(settings | {"r": 4 * settings["r"]}))


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"weights": torch.zeros(2)}, folder / "adapter_model.bin")


def of_odd_numbers(folder: Path) -> None:
    changed(folder, lambda name, tensor: tensor.to(torch.float8_e4m3fn))


def unreadable(folder: Path) -> None:
    (folder / CONFIG).write_text("{")


def of_another_kind(folder: Path) -> None:
    settings = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(settings | {"peft_type": "PROMPT_TUNING"}))


def foreign(folder: Path) -> None:
    identity = {"digest": "xxh3:" + "1" * 32, "model_type": "llama", "name": "other"}
    manifest.write(folder, kind="low_rank", base=identity)


def asked(engine: StepEngine, *deltas: str | None) -> list[Output]:
    sampling = Sampling(max_tokens=6)
    prompts = [
        Request(id=str(at), prompt_ids=[7, 8, 9], delta=it, sampling=sampling) for at, it in enumerate(deltas)
    ]
    return engine.generate(prompts)


@pytest.mark.parametrize(
    "spoil",
    [
        missing, cut, not_finite, narrow, of_high_rank, pickled, of_odd_numbers, unreadable, of_another_kind,
        foreign,
    ],
)  # fmt: skip
def test_its_requests_end_with_400_and_good_ones_beside_them_are_right(
    spoil: Callable[[Path], None],
    engine: StepEngine,
    tiny_base: Path,
    tiny_adapters: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = Path(shutil.copytree(tiny_adapters["a"], tmp_path / "spoilt"))
    manifest.write(
        Path(shutil.copytree(folder, tmp_path / "good")), kind="low_rank", base=base_identity(tiny_base)
    )
    spoil(folder)
    engine.register_delta("good", str(tmp_path / "good"))
    engine.register_delta("spoilt", str(folder))
    try:
        alone = [output.token_ids for output in asked(engine, None, "good")]
        base, spoilt, good = asked(engine, None, "spoilt", "good")
        assert [base.token_ids, good.token_ids] == alone and alone[0] != alone[1]
        assert (spoilt.finish_reason, spoilt.status) == ("error", 400)
        assert str(tmp_path) not in (spoilt.error or "") and "\n" not in caplog.messages[-1]
        assert not engine.has_work() and not engine.stats().blocks_used
    finally:
        engine.unload_delta("good")
        engine.unload_delta("spoilt")

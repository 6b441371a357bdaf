"""DeepSpeed in two real Ray Train workers."""

from pathlib import Path

import pytest

from ftray.cluster import native
from ftray.train.io import LocalIO
from ftray.train.ray_launch import launch
from ftray.train.track.jsonl import read_records
from ftray.train.worker import train
from tests.recipes import MakeRecipe

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_records(folder / "metrics.jsonl") if "grad_norm" in record]


def test_two_workers_train_what_one_process_does_and_compile_nothing(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftray.cluster.ray_session import session

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    reference = make_recipe("reference", adapt="full")
    train(reference, LocalIO(Path(reference.output_dir) / reference.name))
    strategy = {"type": "deepspeed", "zero_stage": 3, "num_workers": 2, "cpus_per_worker": 0.5}
    with session(address="local", num_cpus=2):
        result = launch(make_recipe("zero", adapt="full", strategy=strategy))
    assert losses(result.run_dir) == pytest.approx(losses(Path(reference.output_dir) / "reference"), rel=1e-5)
    assert result.delta is not None and (result.delta / "model.safetensors").is_file()
    assert not list((tmp_path / "extensions").rglob("*")) and not native.locks()

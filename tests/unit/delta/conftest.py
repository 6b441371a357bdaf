"""Fixtures of calculations: bases, their deltas, and the calculation itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ftray.core.spec import build_piece
from ftray.delta.adopt import adopt, adopt_model
from ftray.delta.algebra import derive
from ftray.testing import tiny
from tests.unit.delta.answers import Calculate, parent, plain


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("bases")

    def base(architecture: str) -> Path:
        folder = root / architecture
        return folder if folder.exists() else tiny.tiny_base(folder, architecture)

    return base


@pytest.fixture
def base(bases: Callable[[str], Path]) -> Path:
    return bases("llama")


@pytest.fixture
def low_rank(tmp_path: Path) -> Calculate:
    def make(base: Path, seed: int, r: int = 4) -> Path:
        folder = tmp_path / f"low-{base.name}-{seed}"
        adopt(
            tiny.random_adapter(base, tmp_path / f"peft-{base.name}-{seed}", r=r, seed=seed),
            str(base),
            folder,
        )
        return folder

    return make


@pytest.fixture
def whole(tmp_path: Path) -> Calculate:
    """Replacement weights: the base with noise on every parameter, or `rank` directions on linear layers alone."""

    def make(base: Path, seed: int, scale: float = 0.02, rank: int = 0) -> Path:
        folder, model = tmp_path / f"whole-{seed}", plain(base)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if not rank:
                    p += torch.randn(p.shape, generator=generator) * scale
                elif p.ndim == 2 and "_proj" in name:
                    left = torch.randn(p.shape[0], rank, generator=generator)
                    p += left @ torch.randn(rank, p.shape[1], generator=generator) * scale
        model.save_pretrained(tmp_path / f"hf-{seed}")
        adopt_model(tmp_path / f"hf-{seed}", str(base), folder)
        return folder

    return make


@pytest.fixture
def calculate(tmp_path: Path) -> Calculate:
    count = 0

    def run(method: str, *folders: Path, base: Path, **settings: Any) -> Path:
        nonlocal count
        count += 1
        rest = {key: settings.pop(key) for key in ("rank", "kind", "dtype") if key in settings}
        out = tmp_path / f"out-{count}"
        derive(
            build_piece("combine", {"type": method, **settings}),
            list(map(parent, folders)),
            str(base),
            out,
            **rest,
        )
        return out

    return run

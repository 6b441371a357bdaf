"""A model written tensor by tensor is the folder transformers' own `save_pretrained` writes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from ftray.core.fs import read_json
from ftray.model import save
from ftray.model.build import load_model
from ftray.model.folder import weight_map
from ftray.model.save import save_model
from ftray.testing import tiny


def content(folder: Path) -> dict[str, tuple[Any, list[int]]]:
    """Every key with its type and shape."""
    found = {}
    for key, file in weight_map(folder).items():
        with safe_open(file, "pt") as opened:
            part = opened.get_slice(key)
            found[key] = (part.get_dtype(), part.get_shape())
    return found


@pytest.mark.parametrize("architecture", list(tiny.ARCHITECTURES))
def test_equals_save_pretrained(tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same keys, types and shapes, experts parted and tied weights once; in several files too."""
    base = tiny.tiny_base(tmp_path / "base", architecture)
    model = load_model(base)
    monkeypatch.setattr(save, "MAX_FILE_BYTES", 100_000)
    save_model(model, ((n, p.detach()) for n, p in model.named_parameters()), tmp_path / "ours")
    assert content(tmp_path / "ours") == content(base)
    index = read_json(tmp_path / "ours" / "model.safetensors.index.json")
    assert len(set(index["weight_map"].values())) > 1
    one = AutoModelForCausalLM.from_pretrained(base)
    two = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(one) is type(two)
    for (name, a), (other, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b)
    ignored = {"_name_or_path", "transformers_version"}
    ours, theirs = (
        {k: v for k, v in read_json(folder / "config.json").items() if k not in ignored}
        for folder in (tmp_path / "ours", base)
    )
    assert ours == theirs
    generation = "generation_config.json"
    assert read_json(tmp_path / "ours" / generation) == read_json(base / generation)


def test_a_missing_tensor_is_no_model(tmp_path: Path) -> None:
    model = load_model(tiny.tiny_base(tmp_path / "base"))
    with pytest.raises(AssertionError, match="announced and not written"):
        save_model(model, list(model.named_parameters())[1:], tmp_path / "ours")
